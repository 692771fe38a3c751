#pragma once

#include "dtype.h"
#include "math.h"

namespace nudging::cpu {

template <class V>
typename V::F activate(Activation activation, typename V::F x) {
  switch (activation) {
    case Activation::silu:
      return x / (exp<V>(-x) + 1.0f);
    case Activation::gelu:
      return x * normal_cdf<V>(x);
    case Activation::gelu_tanh: {
      // x (1 + tanh(u)) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
      const auto u = x * V::fma(x * x, V::broadcast(0.0356774081f), V::broadcast(0.797884561f));
      return x / (exp<V>(u * -2.0f) + 1.0f);
    }
  }
  return x;
}

// Rows [begin, end).
template <class V>
void gated_act(const GatedAct& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (std::int64_t row = begin; row < end; ++row) {
      const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.dim;
      T* out = static_cast<T*>(a.out) + row * a.dim;
      for (std::int64_t i = 0; i < a.dim; i += V::kLanes) {
        const std::int64_t left = a.dim - i;
        V::store(
            out + i,
            activate<V>(a.activation, V::load(gate + i, left)) * V::load(gate + a.dim + i, left),
            left);
      }
    }
  });
}

}  // namespace nudging::cpu
