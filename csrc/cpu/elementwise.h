// Rope, the gated activation and the soft cap: no sums, so rows cannot touch each other.
#pragma once

#include <string.h>

#include "dtype.h"
#include "math.h"

namespace nudging::cpu {

template <class V, class T>
void rope_head(const Rope& a, const float* cos, const float* sin, const T* x, T* out) {
  for (std::int64_t i = 0; i < a.half; i += V::kLanes) {
    const std::int64_t left = a.half - i;
    const auto c = V::load(cos + i, left), s = V::load(sin + i, left);
    const auto first = V::load(x + i, left), second = V::load(x + a.half + i, left);
    V::store(out + i, V::fma(first, c, -(second * s)), left);
    V::store(out + a.half + i, V::fma(second, c, first * s), left);
  }
  ::memcpy(out + 2 * a.half, x + 2 * a.half,
           static_cast<std::size_t>(a.head_dim - 2 * a.half) * sizeof(T));
}

// Rows [begin, end).
template <class V>
void rope(const Rope& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t angle = a.positions[row] * a.half;
      for (std::int64_t head = 0; head < a.heads; ++head) {
        const std::int64_t at = (row * a.heads + head) * a.head_dim;
        rope_head<V>(a, a.cos + angle, a.sin + angle, static_cast<const T*>(a.x) + at,
                     static_cast<T*>(a.out) + at);
      }
    }
  });
}

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

template <class V>
typename V::F cap_logits(typename V::F logits, float cap) {
  return tanh<V>(logits / cap) * cap;
}

// Elements [begin, end) of the flattened logits.
template <class V>
void soft_cap(const SoftCap& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* logits = static_cast<const T*>(a.logits);
    T* out = static_cast<T*>(a.out);
    for (std::int64_t i = begin; i < end; i += V::kLanes) {
      V::store(out + i, cap_logits<V>(V::load(logits + i, end - i), a.cap), end - i);
    }
  });
}

}  // namespace nudging::cpu
