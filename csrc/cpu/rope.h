#pragma once

#include <string.h>

#include "dtype.h"

namespace nudging::cpu {

// One head of `head_dim` channels, the first 2 * half of them turned.
template <class V, class T>
void rope_head(const float* cos, const float* sin, std::int64_t half, std::int64_t head_dim,
               const T* x, T* out) {
  for (std::int64_t i = 0; i < half; i += V::kLanes) {
    const std::int64_t left = half - i;
    const auto c = V::load(cos + i, left), s = V::load(sin + i, left);
    const auto first = V::load(x + i, left), second = V::load(x + half + i, left);
    V::store(out + i, V::fma(first, c, -(second * s)), left);
    V::store(out + half + i, V::fma(second, c, first * s), left);
  }
  ::memcpy(out + 2 * half, x + 2 * half, static_cast<std::size_t>(head_dim - 2 * half) * sizeof(T));
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
        rope_head<V>(a.cos + angle, a.sin + angle, a.half, a.head_dim,
                     static_cast<const T*>(a.x) + at, static_cast<T*>(a.out) + at);
      }
    }
  });
}

// Rows [begin, end): queries are turned, keys are turned into their slots, values copied.
template <class V>
void rope_append(const RopeAppend& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (std::int64_t row = begin; row < end; ++row) {
      const float* cos = a.cos + a.positions[row] * a.half;
      const float* sin = a.sin + a.positions[row] * a.half;
      const auto turn = [&](const T* x, T* out, std::int64_t heads) {
        for (std::int64_t at = 0; at < heads * a.head_dim; at += a.head_dim) {
          rope_head<V>(cos, sin, a.half, a.head_dim, x + at, out + at);
        }
      };
      const std::int64_t slot = a.slot_mapping[row] * a.kv_heads * a.head_dim;
      turn(static_cast<const T*>(a.q) + row * a.q_stride,
           static_cast<T*>(a.q_out) + row * a.heads * a.head_dim, a.heads);
      turn(static_cast<const T*>(a.k) + row * a.k_stride, static_cast<T*>(a.k_cache) + slot,
           a.kv_heads);
      ::memcpy(static_cast<T*>(a.v_cache) + slot, static_cast<const T*>(a.v) + row * a.v_stride,
               static_cast<std::size_t>(a.kv_heads * a.head_dim) * sizeof(T));
    }
  });
}

}  // namespace nudging::cpu
