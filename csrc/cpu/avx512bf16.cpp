// Compiled with AVX-512 and AVX512-BF16 switched on; see CMakeLists.txt.
#include "avx512.h"
#include "table.h"

namespace nudging::cpu {

struct Avx512Bf16 : Avx512Lanes<Avx512Bf16> {
  static constexpr bool kHasPairs = true;

  static F fma_pairs(const bf16* x, const bf16* y, F sum) {
    __m512bh left, right;
    std::memcpy(&left, x, sizeof left);
    std::memcpy(&right, y, sizeof right);
    return _mm512_dpbf16_ps(sum, left, right);
  }
};

const Kernels kAvx512Bf16 = kTable<Avx512Bf16>;

}  // namespace nudging::cpu
