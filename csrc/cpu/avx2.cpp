// Compiled with AVX2, FMA and F16C switched on; see CMakeLists.txt.
#include <immintrin.h>

#include "table.h"

namespace nudging::cpu {

struct Avx2 : Lanes<Avx2, 8> {
  // 8 sums, 4 weights and an input: with a row more GCC 12 spills.
  static constexpr int kTileRows = 4, kTilePanels = 1;
  // So many that their x stays in the nearest cache from panel to panel.
  static constexpr std::int64_t kBlockRows = 20;
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  static F widen(H bits) {
    __m128i packed;
    std::memcpy(&packed, &bits, sizeof packed);
    return _mm256_cvtph_ps(packed);
  }

  static F widen_int8(B x) {
    long long bits;
    std::memcpy(&bits, &x, sizeof bits);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits)));
  }

  static H narrow(F x) {
    const __m128i packed = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    H bits;
    std::memcpy(&bits, &packed, sizeof bits);
    return bits;
  }
};

const Kernels kAvx2 = kTable<Avx2>;

}  // namespace nudging::cpu
