#pragma once

#include "dot.h"
#include "dtype.h"

namespace nudging::cpu {

// Rows whose inputs stay in the cache while the weights stream by once.
constexpr std::int64_t kRowBlock = 32;

// A row alone streams large panels best by itself; else the next panel is asked for while this one
// is worked on, which fills the time in which only the cache is read.
constexpr std::int64_t kOwnStreamBytes = 16384;

constexpr std::int64_t kCacheLine = 64;

// The weights of one panel; past the last column, that column again.
template <class T>
struct Panel {
  const T* weight[kTileCols];
  std::int64_t col, cols;
};

// A tile's part of the next panel: so many lines of it are prefetched with every line of this one.
template <class T>
struct Ahead {
  const char* from;
  int lines;

  // Left to itself, GCC takes a function that only prefetches for one without effect.
  [[gnu::always_inline]] void operator()(std::int64_t i) const {
    const std::int64_t bytes = i * static_cast<std::int64_t>(sizeof(T));
    if (lines == 0 || bytes % kCacheLine != 0) return;
    const char* next = from + bytes * lines;
    __builtin_prefetch(next);
    if (lines == 1) return;
    __builtin_prefetch(next + kCacheLine);
    if (lines == 2) return;
    __builtin_prefetch(next + 2 * kCacheLine);
    __builtin_prefetch(next + 3 * kCacheLine);
  }
};

// One tile of kRows rows by one panel.
template <class V, int kRows, class T, class W, class Out>
void linear_tile(const Linear& a, const Panel<W>& panel, const Ahead<W>& ahead, std::int64_t row) {
  const T* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const T*>(a.x) + (row + r) * a.in;
  // Whole registers of sums: the results of several rows are rounded at once.
  constexpr int kRowsAtOnce = V::kLanes / kTileCols;
  constexpr int kPadded = (kRows + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce;
  float product[kPadded][kTileCols] = {};
  dot_tile<V, kRows>(x, panel.weight, a.in, ahead,
                     reinterpret_cast<float (&)[kRows][kTileCols]>(product));
  float bias[kRowsAtOnce][kTileCols] = {}, scales[kRowsAtOnce][kTileCols];
  for (int r = 0; r < kRowsAtOnce; ++r) {
    for (std::int64_t c = 0; c < kTileCols; ++c) {
      const std::int64_t col = panel.col + (c < panel.cols ? c : panel.cols - 1);
      if (a.bias != nullptr) bias[r][c] = V::load(static_cast<const T*>(a.bias) + col, 1)[0];
      if constexpr (std::is_same_v<W, std::int8_t>) scales[r][c] = a.scales[col];
    }
  }
  for (int first = 0; first < kRows; first += kRowsAtOnce) {
    typename V::F y = V::load_full(product[first]);
    if constexpr (std::is_same_v<W, std::int8_t>) y = y * V::load_full(scales[0]);
    y = y + V::load_full(bias[0]);
    Out rounded[V::kLanes];
    V::store_full(rounded, y);
    for (int r = first; r < kRows && r < first + kRowsAtOnce; ++r) {
      const Out* from = rounded + (r - first) * kTileCols;
      Out* out = static_cast<Out*>(a.out) + (row + r) * a.cols + panel.col;
      if (panel.cols == kTileCols) {
        std::memcpy(out, from, kTileCols * sizeof(Out));
      } else {
        for (std::int64_t c = 0; c < panel.cols; ++c) out[c] = from[c];
      }
    }
  }
}

// A tile of `rows` <= kRows rows.
template <class V, int kRows, class T, class W, class Out>
void linear_rows(const Linear& a, const Panel<W>& panel, const Ahead<W>& ahead, std::int64_t row,
                 std::int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return linear_rows<V, kRows - 1, T, W, Out>(a, panel, ahead, row, rows);
  }
  linear_tile<V, kRows, T, W, Out>(a, panel, ahead, row);
}

// Panels [begin, end) of kTileCols columns each.
template <class V, class T, class W, class Out>
void linear_panels(const Linear& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t panel_bytes = kTileCols * a.in * static_cast<std::int64_t>(sizeof(W));
  const bool looks_ahead = a.rows > 1 || panel_bytes <= kOwnStreamBytes;
  const std::int64_t end_col = end * kTileCols < a.cols ? end * kTileCols : a.cols;
  for (std::int64_t first = 0; first < a.rows; first += kRowBlock) {
    const std::int64_t rows = a.rows - first < kRowBlock ? a.rows - first : kRowBlock;
    // Tiles of nearly equal size, which share the next panel's columns.
    const std::int64_t tiles = (rows + V::kTileRows - 1) / V::kTileRows;
    for (std::int64_t col = begin * kTileCols; col < end_col; col += kTileCols) {
      const W* weight = static_cast<const W*>(a.weight) + col * a.in;
      const std::int64_t left = end_col - col;
      Panel<W> panel{{}, col, left < kTileCols ? left : kTileCols};
      for (std::int64_t c = 0; c < kTileCols; ++c) {
        panel.weight[c] = weight + (c < panel.cols ? c : panel.cols - 1) * a.in;
      }
      const bool has_next = looks_ahead && left >= 2 * kTileCols;
      const int lines = !has_next ? 0 : tiles == 1 ? 4 : tiles < 4 ? 2 : 1;
      const char* next = reinterpret_cast<const char*>(weight) + panel_bytes;
      std::int64_t done = 0;
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t row = rows * tile / tiles, row_end = rows * (tile + 1) / tiles;
        const int now = tiles == 3 ? (tile == 0 ? 2 : 1) : lines;
        const Ahead<W> ahead{next + done * panel_bytes / kTileCols, done < 4 && has_next ? now : 0};
        done += now;
        linear_rows<V, V::kTileRows, T, W, Out>(a, panel, ahead, first + row, row_end - row);
      }
    }
  }
}

template <class V, class T, class W>
void linear_into(const Linear& a, std::int64_t begin, std::int64_t end) {
  if (a.out_dtype == a.dtype) {
    linear_panels<V, T, W, T>(a, begin, end);
  } else {
    linear_panels<V, T, W, float>(a, begin, end);
  }
}

template <class V>
void linear(const Linear& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto in) {
    using T = decltype(in);
    if (a.scales != nullptr) {
      linear_into<V, T, std::int8_t>(a, begin, end);
    } else {
      linear_into<V, T, T>(a, begin, end);
    }
  });
}

}  // namespace nudging::cpu
