// Compiled with AVX-512 switched on; see CMakeLists.txt.
#include <immintrin.h>

#include "table.h"

namespace nudging::cpu {

struct Avx512 : Lanes<Avx512, 16> {
  static constexpr int kTileRows = 4;
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  static F widen(H bits) {
    __m256i packed;
    std::memcpy(&packed, &bits, sizeof packed);
    return _mm512_cvtph_ps(packed);
  }

  static H narrow(F x) {
    const __m256i packed = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    H bits;
    std::memcpy(&bits, &packed, sizeof bits);
    return bits;
  }
};

const Kernels kAvx512 = kTable<Avx512>;

}  // namespace nudging::cpu
