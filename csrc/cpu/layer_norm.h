#pragma once

#include <math.h>

#include "dtype.h"

namespace nudging::cpu {

template <class V, class T>
void layer_norm_row(const LayerNorm& a, const T* x, T* out) {
  typename V::F total{};
  for (std::int64_t i = 0; i < a.dim; i += V::kLanes) total = total + V::load(x + i, a.dim - i);
  const auto mean = V::broadcast(V::sum(total) / static_cast<float>(a.dim));
  typename V::F squares{};
  for (std::int64_t i = 0; i < a.dim; i += V::kLanes) {
    const auto inside = V::first(a.dim - i);
    const auto y = V::select(inside, V::load(x + i, a.dim - i) - mean, typename V::F{});
    squares = V::fma(y, y, squares);
  }
  const float scale = 1.0f / ::sqrtf(V::sum(squares) / static_cast<float>(a.dim) + a.eps);
  for (std::int64_t i = 0; i < a.dim; i += V::kLanes) {
    V::store(out + i, (V::load(x + i, a.dim - i) - mean) * scale, a.dim - i);
  }
}

// Rows [begin, end).
template <class V>
void layer_norm(const LayerNorm& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (std::int64_t row = begin; row < end; ++row) {
      layer_norm_row<V>(a, static_cast<const T*>(a.x) + row * a.dim,
                        static_cast<T*>(a.out) + row * a.dim);
    }
  });
}

}  // namespace nudging::cpu
