// What the AVX-512 instruction sets have in common; a template, so that each has code of its own.
#pragma once

#include <immintrin.h>

#include "vec.h"

namespace nudging::cpu {

template <class Arch>
struct Avx512Lanes : Lanes<Arch, 16> {
  using F = typename Lanes<Arch, 16>::F;
  using U = typename Lanes<Arch, 16>::U;
  using I = typename Lanes<Arch, 16>::I;
  using H = typename Lanes<Arch, 16>::H;
  using B = typename Lanes<Arch, 16>::B;

  // 24 sums, 4 weights and an input: 29 of 32 registers.
  static constexpr int kTileRows = 6, kTilePanels = 4;
  // Rows that go through a chunk of the weights while it is in the nearest cache.
  static constexpr std::int64_t kBlockRows = 64;

  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  static F widen(H bits) {
    __m256i packed;
    std::memcpy(&packed, &bits, sizeof packed);
    return _mm512_cvtph_ps(packed);
  }

  // GCC 12 converts vectors of this size in halves.
  static U widen_bits(H bits) {
    __m256i packed;
    std::memcpy(&packed, &bits, sizeof packed);
    const __m512i wide = _mm512_cvtepu16_epi32(packed);
    U result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
  }

  static F to_float(I x) {
    __m512i bits;
    std::memcpy(&bits, &x, sizeof bits);
    return _mm512_cvtepi32_ps(bits);
  }

  static F widen_int8(B x) {
    __m128i packed;
    std::memcpy(&packed, &x, sizeof packed);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(packed));
  }

  static H narrow(F x) {
    const __m256i packed = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    H bits;
    std::memcpy(&bits, &packed, sizeof bits);
    return bits;
  }
};

}  // namespace nudging::cpu
