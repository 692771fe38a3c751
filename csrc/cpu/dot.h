// The one inner product of linear and attention.
#pragma once

#include <type_traits>

#include "nudging/cpu.h"
#include "vec.h"

namespace nudging::cpu {

// How many right-hand vectors one tile has.
constexpr int kTileCols = kLinearPanel;

// out[r][c] = x[r] . y[c].  Where the processor multiplies pairs of bf16, lane l of an element's
// register first adds the terms 2l, 2l + 1 of every whole pair of registers; then, or else from the
// start, lane l adds the terms l, l + kLanes, ... in this order; last, one fixed tree adds the
// lanes.  The tile's shape decides what is kept in registers and nothing else.
//
// `at_step` is called with every index at which a step begins: a place to prefetch from.
template <class V, int kRows, class X, class Y, class AtStep>
void dot_tile(const X* const (&x)[kRows], const Y* const (&y)[kTileCols], std::int64_t size,
              const AtStep& at_step, float (&out)[kRows][kTileCols]) {
  typename V::F total[kRows][kTileCols] = {};
  const auto add = [&](std::int64_t i, auto load_x, auto load_y) {
    typename V::F right[kTileCols];
#pragma GCC unroll 4
    for (int c = 0; c < kTileCols; ++c) right[c] = load_y(y[c] + i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename V::F left = load_x(x[r] + i);
#pragma GCC unroll 4
      for (int c = 0; c < kTileCols; ++c) total[r][c] = V::fma(left, right[c], total[r][c]);
    }
  };
  std::int64_t i = 0;
  if constexpr (V::kHasPairs && std::is_same_v<X, bf16> && !std::is_same_v<Y, float>) {
    for (; i + 2 * V::kLanes <= size; i += 2 * V::kLanes) {
      at_step(i);
      typename V::Pairs right[kTileCols];
#pragma GCC unroll 4
      for (int c = 0; c < kTileCols; ++c) right[c] = V::load_pairs(y[c] + i);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename V::Pairs left = V::load_pairs(x[r] + i);
#pragma GCC unroll 4
        for (int c = 0; c < kTileCols; ++c) {
          total[r][c] = V::fma_pairs(left, right[c], total[r][c]);
        }
      }
    }
  }
  for (; i + V::kLanes <= size; i += V::kLanes) {
    at_step(i);
    add(i, [](const X* p) { return V::load_full(p); }, [](const Y* p) { return V::load_full(p); });
  }
  if (i < size) {
    const std::int64_t left = size - i;
    add(
        i, [left](const X* p) { return V::load(p, left); },
        [left](const Y* p) { return V::load(p, left); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) V::sum4(total[r], out[r]);
}

}  // namespace nudging::cpu
