// The inner products of attention.
#pragma once

#include "nudging/cpu.h"
#include "vec.h"

namespace nudging::cpu {

// How many right-hand vectors one tile has.
constexpr int kTileCols = 4;

// out[r][c] = x[r] . y[c].  Lane l adds the terms l, l + kLanes, ... in this order; then one fixed
// tree adds the lanes.  The tile's shape decides what is kept in registers and nothing else.
template <class V, int kRows, class Y>
void dot_tile(const float* const (&x)[kRows], const Y* const (&y)[kTileCols], std::int64_t size,
              float (&out)[kRows][kTileCols]) {
  typename V::F total[kRows][kTileCols] = {};
  const auto add = [&](std::int64_t i, auto load) {
    typename V::F right[kTileCols];
#pragma GCC unroll 4
    for (int c = 0; c < kTileCols; ++c) right[c] = load(y[c] + i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename V::F left = load(x[r] + i);
#pragma GCC unroll 4
      for (int c = 0; c < kTileCols; ++c) total[r][c] = V::fma(left, right[c], total[r][c]);
    }
  };
  std::int64_t i = 0;
  for (; i + V::kLanes <= size; i += V::kLanes)
    add(i, [](auto from) { return V::load_full(from); });
  if (i < size) {
    const std::int64_t left = size - i;
    add(i, [left](auto from) { return V::load(from, left); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) V::sum4(total[r], out[r]);
}

}  // namespace nudging::cpu
