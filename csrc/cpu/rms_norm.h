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
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t at = row / a.group * a.stride + row % a.group * a.dim;
      const T* x = static_cast<const T*>(a.x) + at;
      if (a.y != nullptr) {
        // The sum is rounded before it is normalised, as it would be between two ops.
        const T* y = static_cast<const T*>(a.y) + at;
        T* sum = static_cast<T*>(a.sum) + at;
        for (std::int64_t i = 0; i < a.dim; i += V::kLanes) {
          const std::int64_t left = a.dim - i;
          V::store(sum + i, V::load(x + i, left) + V::load(y + i, left), left);
        }
        x = sum;
      }
      rms_norm_row<V>(a, x, static_cast<const T*>(a.weight), static_cast<T*>(a.out) + at);
    }
  });
}

}  // namespace nudging::cpu
