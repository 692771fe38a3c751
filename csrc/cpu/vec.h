// A register of fp32 lanes, built on GCC and Clang vector extensions.
//
// An instruction set is a struct derived from Lanes that adds what the extensions cannot say: fma,
// and the conversions of half precision.  Everything here is a template on it, so that no symbol
// compiled for one processor is ever linked into the code of another.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace nudging::cpu {

struct bf16 {
  std::uint16_t bits;
};

struct f16 {
  std::uint16_t bits;
};

// GCC wants the size of a vector as a plain number.
template <int kWidth>
struct Register;

template <>
struct Register<4> {
  typedef float F __attribute__((vector_size(16)));
  typedef std::uint32_t U __attribute__((vector_size(16)));
  typedef std::int32_t I __attribute__((vector_size(16)));
  typedef std::uint16_t H __attribute__((vector_size(8)));
  typedef std::int8_t B __attribute__((vector_size(4)));
};

template <>
struct Register<8> {
  typedef float F __attribute__((vector_size(32)));
  typedef std::uint32_t U __attribute__((vector_size(32)));
  typedef std::int32_t I __attribute__((vector_size(32)));
  typedef std::uint16_t H __attribute__((vector_size(16)));
  typedef std::int8_t B __attribute__((vector_size(8)));
};

template <>
struct Register<16> {
  typedef float F __attribute__((vector_size(64)));
  typedef std::uint32_t U __attribute__((vector_size(64)));
  typedef std::int32_t I __attribute__((vector_size(64)));
  typedef std::uint16_t H __attribute__((vector_size(32)));
  typedef std::int8_t B __attribute__((vector_size(16)));
};

template <class Arch, int kWidth>
struct Lanes {
  static constexpr int kLanes = kWidth;
  // Whether Arch has Pairs, a register of bf16, loaded by load_pairs from bf16 or int8, and
  // fma_pairs(x, y, sum): lane l of `sum` plus x[2l] y[2l] + x[2l + 1] y[2l + 1].
  static constexpr bool kHasPairs = false;
  using F = typename Register<kWidth>::F;  // fp32
  using U = typename Register<kWidth>::U;  // the same bits
  using I = typename Register<kWidth>::I;  // masks and indices
  using H = typename Register<kWidth>::H;  // the bits of bf16 and fp16
  using B = typename Register<kWidth>::B;  // int8

  static F broadcast(float x) { return F{} + x; }
  static I broadcast_int(std::int32_t x) { return I{} + x; }

  static I iota() {
    I lanes{};
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return lanes;
  }

  // The mask of the first `count` lanes, of none or of all.
  static I first(std::int64_t count) {
    const std::int64_t some = count < 0 ? 0 : count;
    return iota() < broadcast_int(static_cast<std::int32_t>(some < kLanes ? some : kLanes));
  }

  static F select(I mask, F yes, F no) { return mask ? yes : no; }
  static I select(I mask, I yes, I no) { return mask ? yes : no; }

  // NaN in `x` stays, as in torch.
  static F at_least(F x, float low) { return select(x < broadcast(low), broadcast(low), x); }
  static F at_most(F x, float high) { return select(x > broadcast(high), broadcast(high), x); }
  static F abs(F x) { return from_bits(to_bits(x) & 0x7fffffffu); }

  static U to_bits(F x) {
    U bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  }

  static F from_bits(U bits) {
    F x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  static F widen_int8(B x) { return __builtin_convertvector(x, F); }
  static U widen_bits(H bits) { return __builtin_convertvector(bits, U); }
  static F widen_bf16(H bits) { return from_bits(Arch::widen_bits(bits) << 16); }
  static F to_float(I x) { return __builtin_convertvector(x, F); }

  // The whole register from memory, whatever the alignment.
  static F load_full(const float* from) {
    F x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }

  static F load_full(const bf16* from) {
    H bits;
    std::memcpy(&bits, from, sizeof bits);
    return Arch::widen_bf16(bits);
  }

  static F load_full(const f16* from) {
    H bits;
    std::memcpy(&bits, from, sizeof bits);
    return Arch::widen(bits);
  }

  static F load_full(const std::int8_t* from) {
    B x;
    std::memcpy(&x, from, sizeof x);
    return Arch::widen_int8(x);
  }

  // Of pairs that stand side by side the first ones and the second ones.
  static void load_both(const bf16* from, F& even, F& odd) {
    U bits;
    std::memcpy(&bits, from, sizeof bits);
    even = from_bits(bits << 16);
    odd = from_bits(bits & 0xffff0000u);
  }

  static void load_both(const std::int8_t* from, F& even, F& odd) {
    H bits;
    std::memcpy(&bits, from, sizeof bits);
    const U wide = Arch::widen_bits(bits);
    I low, high;
    const U to_left = wide << 24, whole = wide << 16;
    std::memcpy(&low, &to_left, sizeof low);
    std::memcpy(&high, &whole, sizeof high);
    even = Arch::to_float(low >> 24);
    odd = Arch::to_float(high >> 24);
  }

  static float one(const float* from) { return *from; }

  static float one(const bf16* from) {
    const std::uint32_t bits = std::uint32_t{from->bits} << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  // The first `left` elements, at most a register of them; lanes past them hold 0.  Nothing past
  // them is touched.
  template <class T>
  static F load(const T* from, std::int64_t left) {
    if (left >= kLanes) return load_full(from);
    T padded[kLanes] = {};
    for (std::int64_t i = 0; i < left; ++i) padded[i] = from[i];
    return load_full(padded);
  }

  static void store_full(float* to, F x) { std::memcpy(to, &x, sizeof x); }

  // Round to nearest even; NaN stays NaN.
  static void store_full(bf16* to, F x) {
    const U bits = to_bits(x);
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U kept = x == x ? rounded : (bits >> 16) | 0x40u;
    const H narrow = __builtin_convertvector(kept, H);
    std::memcpy(to, &narrow, sizeof narrow);
  }

  static void store_full(f16* to, F x) {
    const H narrow = Arch::narrow(x);
    std::memcpy(to, &narrow, sizeof narrow);
  }

  template <class T>
  static void store(T* to, F x, std::int64_t left) {
    if (left >= kLanes) return store_full(to, x);
    T padded[kLanes];
    store_full(padded, x);
    for (std::int64_t i = 0; i < left; ++i) to[i] = padded[i];
  }

  // Always the same tree: halves onto halves.
  static float sum(F x) {
    if constexpr (kLanes == 4) {
      return (x[0] + x[2]) + (x[1] + x[3]);
    } else {
      typename Register<kLanes / 2>::F halves[2];
      std::memcpy(halves, &x, sizeof halves);
      return Lanes<Arch, kLanes / 2>::sum(halves[0] + halves[1]);
    }
  }

  // The sums of four registers, each by the tree of `sum`.
  static void sum4(const F (&x)[4], float (&out)[4]) {
    using Quad = typename Register<4>::F;
    if constexpr (kLanes == 4) {
      // Transposed, the four trees are three additions.
      const Quad low = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5),
                 high = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7),
                 low2 = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5),
                 high2 = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
      const Quad first = low + high, second = low2 + high2;
      const Quad sums = __builtin_shufflevector(first, second, 0, 1, 4, 5) +
                        __builtin_shufflevector(first, second, 2, 3, 6, 7);
      std::memcpy(out, &sums, sizeof sums);
    } else {
      typename Register<kLanes / 2>::F halves[4];
      for (int i = 0; i < 4; ++i) {
        typename Register<kLanes / 2>::F parts[2];
        std::memcpy(parts, &x[i], sizeof parts);
        halves[i] = parts[0] + parts[1];
      }
      Lanes<Arch, kLanes / 2>::sum4(halves, out);
    }
  }

  static float max(F x) {
    float best = x[0];
    for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
    return best;
  }
};

}  // namespace nudging::cpu
