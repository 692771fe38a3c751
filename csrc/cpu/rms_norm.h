#pragma once

#include <math.h>

#include "dtype.h"

namespace nudging::cpu {

template <class V, class T>
void rms_norm_row(const RmsNorm& a, const T* x, const T* weight, T* out) {
  typename V::F squares{};
  for (std::int64_t i = 0; i < a.dim; i += V::kLanes) {
    const auto y = V::load(x + i, a.dim - i);
    squares = V::fma(y, y, squares);
  }
  const float scale = 1.0f / ::sqrtf(V::sum(squares) / static_cast<float>(a.dim) + a.eps);
  const float offset = a.unit_offset ? 1.0f : 0.0f;
  for (std::int64_t i = 0; i < a.dim; i += V::kLanes) {
    const auto y = V::load(x + i, a.dim - i) * scale;
    V::store(out + i, y * (V::load(weight + i, a.dim - i) + offset), a.dim - i);
  }
}

// Rows [begin, end).
template <class V>
void rms_norm(const RmsNorm& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x);
    for (std::int64_t row = begin; row < end; ++row) {
      if (a.y != nullptr) {
        // The sum is rounded before it is normalised, as it would be between two ops.
        const T* y = static_cast<const T*>(a.y) + row * a.dim;
        T* sum = static_cast<T*>(a.sum) + row * a.dim;
        for (std::int64_t i = 0; i < a.dim; i += V::kLanes) {
          const std::int64_t left = a.dim - i;
          V::store(sum + i, V::load(x + row * a.dim + i, left) + V::load(y + i, left), left);
        }
      }
      const T* from = a.y != nullptr ? static_cast<const T*>(a.sum) : x;
      rms_norm_row<V>(a, from + row * a.dim, static_cast<const T*>(a.weight),
                      static_cast<T*>(a.out) + row * a.dim);
    }
  });
}

}  // namespace nudging::cpu
