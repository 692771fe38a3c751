// The one inner product of linear and attention.
#pragma once

#include "nudging/cpu.h"
#include "vec.h"

namespace nudging::cpu {

// How many right-hand vectors one tile has.
constexpr int kTileCols = kLinearPanel;

// out[r][c] = x[r] . y[c].  Lane l of an element's register adds the terms l, l + kLanes, ... in
// this order, then one fixed tree adds the lanes: the tile's shape decides what is kept in
// registers and nothing else.
template <class V, int kRows, class X, class Y>
void dot_tile(const X* const (&x)[kRows], const Y* const (&y)[kTileCols], std::int64_t size,
              float (&out)[kRows][kTileCols]) {
  typename V::F total[kRows][kTileCols] = {};
  const auto add = [&](std::int64_t i, auto load_x, auto load_y) {
    typename V::F right[kTileCols];
#pragma GCC unroll 4
    for (int c = 0; c < kTileCols; ++c) right[c] = load_y(y[c] + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const typename V::F left = load_x(x[r] + i);
#pragma GCC unroll 4
      for (int c = 0; c < kTileCols; ++c) total[r][c] = V::fma(left, right[c], total[r][c]);
    }
  };
  const std::int64_t whole = size / V::kLanes * V::kLanes;
  for (std::int64_t i = 0; i < whole; i += V::kLanes) {
    add(i, [](const X* p) { return V::load_full(p); }, [](const Y* p) { return V::load_full(p); });
  }
  if (whole < size) {
    const std::int64_t left = size - whole;
    add(
        whole, [left](const X* p) { return V::load(p, left); },
        [left](const Y* p) { return V::load(p, left); });
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kTileCols; ++c) out[r][c] = V::sum(total[r][c]);
  }
}

}  // namespace nudging::cpu
