#pragma once

#include <string.h>

#include "dtype.h"

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

}  // namespace nudging::cpu
