#pragma once

#include "dtype.h"
#include "panels.h"

namespace nudging::cpu {

// Bytes of a column in a chunk.  The sums of a chunk begin at zero and are added to those of the
// chunks before: so errors do not grow with the number of terms.
constexpr std::int64_t kChunkBytes = 256;

constexpr std::int64_t kCacheLine = 64;

// One tile streams large panels best by itself.  With more of them, the next chunk is asked for
// while this one is worked on, which fills the time in which only the cache is read.
constexpr std::int64_t kOwnStreamBytes = 16384;

// The type that x is multiplied in: bf16 where the processor multiplies pairs of it, else fp32.
template <class V, class T>
using Factor = std::conditional_t<V::kHasPairs && std::is_same_v<T, bf16>, bf16, float>;

// Terms of a chunk.
template <class W>
constexpr std::int64_t kChunk = kChunkBytes / static_cast<std::int64_t>(sizeof(W));

// A chunk of some panels, and of the next chunk those that this tile asks for; else null.
template <class W, int kPanels>
struct Chunk {
  const W* weight[kPanels];
  const char* next[kPanels];
  std::int64_t terms;

  // Left to itself, GCC takes a function that only prefetches for one without effect.
  [[gnu::always_inline]] void ask_ahead(std::int64_t term) const {
    const std::int64_t bytes = term * kLinearPanel * static_cast<std::int64_t>(sizeof(W));
    if (bytes % kCacheLine != 0) return;
    for (int p = 0; p < kPanels; ++p) {
      if (next[p] != nullptr) __builtin_prefetch(next[p] + bytes, 0, 2);
    }
  }
};

// sums[row][column] += x[row] . weight[column] over the chunk.  Whatever kRows and kPanels are, a
// sum begins at zero and takes the terms in their order.
template <class V, int kRows, int kPanels, class X, class W>
void chunk_tile(const X* x, std::int64_t stride, const Chunk<W, kPanels>& chunk, float* sums) {
  constexpr int kRegs = static_cast<int>(kLinearPanel) / V::kLanes;
  typename V::F total[kRows][kPanels * kRegs] = {};
  const auto add = [&](std::int64_t i, int reg, typename V::F right) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename V::F left = V::broadcast(V::one(x + r * stride + i));
      total[r][reg] = V::fma(left, right, total[r][reg]);
    }
  };
  const std::int64_t whole = chunk.terms / kTerms<W> * kTerms<W>;
  for (std::int64_t i = 0; i < whole; i += kTerms<W>) {
    chunk.ask_ahead(i);
    if constexpr (std::is_same_v<X, bf16>) {
      typename V::Pairs right[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        right[p] = V::load_pairs(chunk.weight[p] + i * kLinearPanel);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename V::Pairs left = V::broadcast_pair(x + r * stride + i);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) total[r][p] = V::fma_pairs(left, right[p], total[r][p]);
      }
    } else {
#pragma GCC unroll 4
      for (int reg = 0; reg < kPanels * kRegs; ++reg) {
        const W* from =
            chunk.weight[reg / kRegs] + i * kLinearPanel + reg % kRegs * V::kLanes * kTerms<W>;
        if constexpr (kTerms<W> == 1) {
          add(i, reg, V::load_full(from));
        } else {
          typename V::F even, odd;
          V::load_both(from, even, odd);
          add(i, reg, even);
          add(i + 1, reg, odd);
        }
      }
    }
  }
  if (whole < chunk.terms) {
    for (int reg = 0; reg < kPanels * kRegs; ++reg) {
      add(whole, reg,
          V::load_full(chunk.weight[reg / kRegs] + whole * kLinearPanel + reg % kRegs * V::kLanes));
    }
  }
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int reg = 0; reg < kPanels * kRegs; ++reg) {
      float* sum = sums + (r * kPanels * kRegs + reg) * V::kLanes;
      V::store_full(sum, V::load_full(sum) + total[r][reg]);
    }
  }
}

// A tile of `rows` <= kRows rows.
template <class V, int kRows, int kPanels, class X, class W>
void chunk_rows(const X* x, std::int64_t stride, const Chunk<W, kPanels>& chunk, float* sums,
                std::int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return chunk_rows<V, kRows - 1, kPanels>(x, stride, chunk, sums, rows);
  }
  chunk_tile<V, kRows, kPanels>(x, stride, chunk, sums);
}

// The sums, with scales and bias, as rows [row, row + rows) of the columns from `col` on.
template <class V, class T, class Out>
void store_sums(const Linear& a, const float* sums, std::int64_t width, std::int64_t row,
                std::int64_t rows, std::int64_t col) {
  const std::int64_t end = col + width < a.cols ? col + width : a.cols;
  for (std::int64_t c = col; c < end; c += V::kLanes) {
    const std::int64_t left = end - c;
    typename V::F scale{}, bias{};
    if (a.scales != nullptr) scale = V::load(a.scales + c, left);
    if (a.bias != nullptr) bias = V::load(static_cast<const T*>(a.bias) + c, left);
    for (std::int64_t r = 0; r < rows; ++r) {
      typename V::F y = V::load_full(sums + r * width + c - col);
      if (a.scales != nullptr) y = y * scale;
      V::store(static_cast<Out*>(a.out) + (row + r) * a.cols + c, y + bias, left);
    }
  }
}

// Of one block of rows, kPanels panels from `panel` on.
template <class V, int kPanels, class T, class W>
class Block {
 public:
  using X = Factor<V, T>;

  Block(const Linear& a, std::int64_t row, std::int64_t panel, std::int64_t end)
      : a_(a),
        row_(row),
        panel_(panel),
        end_(end),
        rows_(a.rows - row < V::kBlockRows ? a.rows - row : V::kBlockRows) {
    std::memset(sums_, 0, static_cast<std::size_t>(rows_ * kPanels * kLinearPanel) * sizeof *sums_);
  }

  void compute() {
    for (std::int64_t first = 0; first < a_.in; first += kChunk<W>) add_chunk(first);
    const std::int64_t col = panel_ * kLinearPanel;
    if (a_.out_dtype == a_.dtype) {
      store_sums<V, T, T>(a_, sums_, kPanels * kLinearPanel, row_, rows_, col);
    } else {
      store_sums<V, T, float>(a_, sums_, kPanels * kLinearPanel, row_, rows_, col);
    }
  }

 private:
  void add_chunk(std::int64_t first) {
    const std::int64_t left = a_.in - first, terms = left < kChunk<W> ? left : kChunk<W>;
    const T* from = static_cast<const T*>(a_.x) + row_ * a_.in + first;
    std::int64_t stride = a_.in;
    const X* x = factors(from, terms, stride);
    // Tiles of nearly equal size; each asks for its part of what comes next.
    const std::int64_t tiles = (rows_ + V::kTileRows - 1) / V::kTileRows;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const std::int64_t row = rows_ * tile / tiles, row_end = rows_ * (tile + 1) / tiles;
      const Chunk<W, kPanels> chunk = chunk_of(first, terms, tile, tiles);
      chunk_rows<V, V::kTileRows, kPanels>(x + row * stride, stride, chunk,
                                           sums_ + row * kPanels * kLinearPanel, row_end - row);
    }
  }

  // The chunk's x, in fp32 where that is what is multiplied.
  const X* factors(const T* from, std::int64_t terms, std::int64_t& stride) {
    if constexpr (std::is_same_v<X, T>) {
      return from;
    } else {
      for (std::int64_t r = 0; r < rows_; ++r) {
        for (std::int64_t i = 0; i < terms; i += V::kLanes) {
          V::store(wide_ + r * kChunk<W> + i, V::load(from + r * a_.in + i, terms - i), terms - i);
        }
      }
      stride = kChunk<W>;
      return wide_;
    }
  }

  Chunk<W, kPanels> chunk_of(std::int64_t first, std::int64_t terms, std::int64_t tile,
                             std::int64_t tiles) {
    Chunk<W, kPanels> chunk{{}, {}, terms};
    const W* weight = static_cast<const W*>(a_.weight);
    const std::int64_t bytes = kLinearPanel * a_.in * static_cast<std::int64_t>(sizeof(W));
    const bool asks = tiles > 1 || (a_.rows > 1 && bytes <= kOwnStreamBytes);
    for (int p = 0; p < kPanels; ++p) {
      const std::int64_t col = (panel_ + p) * kLinearPanel;
      if (a_.is_packed) {
        const W* panel = weight + col * a_.in;
        chunk.weight[p] = panel + first * kLinearPanel;
        if (asks && p * tiles / kPanels == tile) chunk.next[p] = next(panel, first, p);
        continue;
      }
      W* packed = packed_ + p * kChunk<W> * kLinearPanel;
      if (tile == 0) pack(weight + col * a_.in + first, a_.in, columns(col), terms, packed);
      chunk.weight[p] = packed;
    }
    return chunk;
  }

  const char* next(const W* panel, std::int64_t first, int p) const {
    if (first + kChunk<W> < a_.in) {
      return reinterpret_cast<const char*>(panel + (first + kChunk<W>)*kLinearPanel);
    }
    if (panel_ + p + kPanels >= end_) return nullptr;
    return reinterpret_cast<const char*>(panel + kPanels * kLinearPanel * a_.in);
  }

  std::int64_t columns(std::int64_t col) const {
    return a_.cols - col < kLinearPanel ? a_.cols - col : kLinearPanel;
  }

  const Linear& a_;
  std::int64_t row_, panel_, end_, rows_;
  alignas(64) float sums_[V::kBlockRows * kPanels * kLinearPanel];
  // Used where x is not multiplied as it is, and where the weight is not packed.
  alignas(64) float wide_[std::is_same_v<X, T> ? 1 : V::kBlockRows * kChunk<W>];
  alignas(64) W packed_[kPanels * kChunk<W> * kLinearPanel];
};

// Panels [begin, end) of kLinearPanel columns each.
template <class V, class T, class W>
void linear_panels(const Linear& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = 0; row < a.rows; row += V::kBlockRows) {
    std::int64_t panel = begin;
    for (; panel + V::kTilePanels <= end; panel += V::kTilePanels) {
      Block<V, V::kTilePanels, T, W>(a, row, panel, end).compute();
    }
    for (; V::kTilePanels > 1 && panel < end; ++panel) {
      Block<V, 1, T, W>(a, row, panel, end).compute();
    }
  }
}

template <class V>
void linear(const Linear& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto in) {
    using T = decltype(in);
    if (a.scales != nullptr) {
      linear_panels<V, T, std::int8_t>(a, begin, end);
    } else {
      linear_panels<V, T, T>(a, begin, end);
    }
  });
}

}  // namespace nudging::cpu
