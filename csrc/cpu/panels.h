// How a weight lies in memory for linear: not column by column but in panels of sixteen columns,
// the terms of a panel one after the other.  So a register holds one term of sixteen columns,
// nothing has to be added up across its lanes, and a whole panel is one stream from the memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "nudging/cpu.h"
#include "vec.h"

namespace nudging::cpu {

// Of bf16 and int8 a column's terms 2t and 2t + 1 stand side by side, as processors multiply them
// that multiply pairs; a last one that has no partner stands as the terms of other types do.
template <class W>
constexpr std::int64_t kTerms = std::is_same_v<W, bf16> || std::is_same_v<W, std::int8_t> ? 2 : 1;

// These functions are static: every instruction set's file has code of its own.

// Panel `to` of `count` terms of `cols` columns that begin `stride` apart; further ones are zeros.
template <class W>
static void pack(const W* from, std::int64_t stride, std::int64_t cols, std::int64_t count, W* to) {
  if (cols < kLinearPanel) {
    std::memset(static_cast<void*>(to), 0,
                static_cast<std::size_t>(count * kLinearPanel) * sizeof(W));
  }
  const std::int64_t whole = count / kTerms<W> * kTerms<W>;
  for (std::int64_t i = 0; i < whole; i += kTerms<W>) {
    for (std::int64_t col = 0; col < cols; ++col) {
      std::memcpy(to + i * kLinearPanel + col * kTerms<W>, from + col * stride + i,
                  kTerms<W> * sizeof(W));
    }
  }
  for (std::int64_t col = 0; whole < count && col < cols; ++col) {
    to[whole * kLinearPanel + col] = from[col * stride + whole];
  }
}

// Column `col` of a panel of `count` terms.
template <class W>
static void unpack(const W* panel, std::int64_t col, std::int64_t count, W* to) {
  const std::int64_t whole = count / kTerms<W> * kTerms<W>;
  for (std::int64_t i = 0; i < whole; i += kTerms<W>) {
    std::memcpy(to + i, panel + i * kLinearPanel + col * kTerms<W>, kTerms<W> * sizeof(W));
  }
  if (whole < count) to[whole] = panel[whole * kLinearPanel + col];
}

}  // namespace nudging::cpu
