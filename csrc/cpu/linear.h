#pragma once

#include "dot.h"
#include "dtype.h"

namespace nudging::cpu {

// Rows whose inputs stay in the cache while the weights stream by once.
constexpr std::int64_t kRowBlock = 32;

// One tile of kRows rows by the columns [col, col + cols) of one panel; `weight` repeats the last
// column past them.
template <class V, int kRows, class T, class Out>
void linear_tile(const Linear& a, const T* const (&weight)[kTileCols], std::int64_t row,
                 std::int64_t col, std::int64_t cols) {
  const T* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const T*>(a.x) + (row + r) * a.in;
  float product[kRows][kTileCols];
  dot_tile<V, kRows>(x, weight, a.in, product);
  float bias[V::kLanes] = {};
  if (a.bias != nullptr) V::store_full(bias, V::load(static_cast<const T*>(a.bias) + col, cols));
  for (int r = 0; r < kRows; ++r) {
    float y[V::kLanes] = {};
    for (int c = 0; c < kTileCols; ++c) y[c] = product[r][c] + bias[c];
    V::store(static_cast<Out*>(a.out) + (row + r) * a.cols + col, V::load_full(y), cols);
  }
}

// The rows [row, end) of one panel: tiles of kRows, and what is left in smaller ones.
template <class V, int kRows, class T, class Out>
void linear_rows(const Linear& a, const T* const (&weight)[kTileCols], std::int64_t row,
                 std::int64_t end, std::int64_t col, std::int64_t cols) {
  for (; row + kRows <= end; row += kRows) linear_tile<V, kRows, T, Out>(a, weight, row, col, cols);
  if constexpr (kRows > 1) {
    if (row < end) linear_rows<V, kRows - 1, T, Out>(a, weight, row, end, col, cols);
  }
}

// Panels [begin, end) of kTileCols columns each.
template <class V, class T, class Out>
void linear_panels(const Linear& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = 0; row < a.rows; row += kRowBlock) {
    const std::int64_t row_end = row + kRowBlock < a.rows ? row + kRowBlock : a.rows;
    for (std::int64_t panel = begin; panel < end; ++panel) {
      const std::int64_t col = panel * kTileCols;
      const std::int64_t cols = a.cols - col < kTileCols ? a.cols - col : kTileCols;
      const T* weight[kTileCols];
      for (std::int64_t c = 0; c < kTileCols; ++c) {
        weight[c] = static_cast<const T*>(a.weight) + (col + (c < cols ? c : cols - 1)) * a.in;
      }
      linear_rows<V, V::kTileRows, T, Out>(a, weight, row, row_end, col, cols);
    }
  }
}

template <class V>
void linear(const Linear& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto in) {
    using T = decltype(in);
    if (a.out_dtype == a.dtype) {
      linear_panels<V, T, T>(a, begin, end);
    } else {
      linear_panels<V, T, float>(a, begin, end);
    }
  });
}

}  // namespace nudging::cpu
