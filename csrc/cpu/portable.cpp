// What runs everywhere: four lanes of whatever the compiler's default target has, and no fused
// multiply-add.
#include "table.h"

namespace nudging::cpu {

struct Portable : Lanes<Portable, 4> {
  static constexpr int kTileRows = 2, kTilePanels = 1;
  static constexpr std::int64_t kBlockRows = 20;
  static F fma(F a, F b, F c) { return a * b + c; }

  // A half's exponent is 112 less than a float's.  Multiplying by 2^112 moves it, subnormal numbers
  // included.
  static F widen(H bits) {
    const U wide = __builtin_convertvector(bits, U);
    const F size = from_bits((wide & 0x7fffu) << 13) * 0x1p112f;
    // What had the exponent of inf or NaN is now at least 2^16.
    const U special = size >= broadcast(65536.0f) ? to_bits(size) | 0x7f800000u : to_bits(size);
    return from_bits(special | (wide & 0x8000u) << 16);
  }

  static H narrow(F x) {
    const U sign = (to_bits(x) & 0x80000000u) >> 16;
    const F size = abs(x);
    // Normal halves: round the 13 bits that go away to nearest even, then move the exponent.
    const U bits = to_bits(size);
    const U normal = (bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23)) >> 13;
    // Subnormal halves: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    const U subnormal = to_bits(size + 0.5f) - 0x3f000000u;
    U half = size < broadcast(0x1p-14f) ? subnormal : normal;
    half = size >= broadcast(65520.0f) ? U{} + 0x7c00u : half;
    half = size == size ? half : U{} + 0x7e00u;
    return __builtin_convertvector(half | sign, H);
  }
};

const Kernels kPortable = kTable<Portable>;

}  // namespace nudging::cpu
