// Compiled with AVX-512 and AVX512-BF16 switched on; see CMakeLists.txt.
#include "avx512.h"
#include "table.h"

namespace nudging::cpu {

struct Avx512Bf16 : Avx512Lanes<Avx512Bf16> {
  static constexpr bool kHasPairs = true;

  using Pairs = __m512bh;

  static Pairs load_pairs(const bf16* from) {
    Pairs pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return pairs;
  }

  // Every int8 is a bf16.
  static Pairs load_pairs(const std::int8_t* from) {
    F even, odd;
    load_both(from, even, odd);
    const U bits = to_bits(even) >> 16 | to_bits(odd);
    Pairs pairs;
    std::memcpy(&pairs, &bits, sizeof pairs);
    return pairs;
  }

  static Pairs broadcast_pair(const bf16* from) {
    std::int32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    const __m512i all = _mm512_set1_epi32(bits);
    Pairs pairs;
    std::memcpy(&pairs, &all, sizeof pairs);
    return pairs;
  }

  static F fma_pairs(Pairs x, Pairs y, F sum) { return _mm512_dpbf16_ps(sum, x, y); }
};

const Kernels kAvx512Bf16 = kTable<Avx512Bf16>;

}  // namespace nudging::cpu
