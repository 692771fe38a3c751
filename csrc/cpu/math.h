// exp, tanh and the normal distribution on a register of lanes: a lane's value depends on nothing
// but that lane.
#pragma once

#include "vec.h"

namespace nudging::cpu {

constexpr float kInf = std::numeric_limits<float>::infinity();

// c[0] + c[1] x + ... by Horner's rule.
template <class V, int kTerms>
typename V::F polynomial(typename V::F x, const float (&c)[kTerms]) {
  typename V::F y = V::broadcast(c[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) y = V::fma(y, x, V::broadcast(c[i]));
  return y;
}

// e^x = 2^n e^r with |r| <= ln(2) / 2, where the Taylor series to r^7 is exact to 6e-9.  Overflows
// to inf, underflows through the subnormal numbers to 0; NaN stays NaN.
template <class V>
typename V::F exp(typename V::F x) {
  constexpr float kTaylor[] = {1.0f,      1.0f,       1 / 2.0f,   1 / 6.0f,
                               1 / 24.0f, 1 / 120.0f, 1 / 720.0f, 1 / 5040.0f};
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  constexpr float kRound = 12582912.0f;
  // ln(2) in two parts; the first has so few bits that n times it is exact.
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = V::at_most(V::at_least(x, -104.0f), 89.0f);
  const auto shifted = V::fma(x, V::broadcast(1.44269504f), V::broadcast(kRound));
  const auto n = shifted - kRound;
  auto r = V::fma(n, V::broadcast(-kLn2High), x);
  r = V::fma(n, V::broadcast(-kLn2Low), r);
  // 2^n in two factors, both normal: n reaches from -150 to 128.  The bias keeps every intermediate
  // positive.
  const auto biased = V::to_bits(shifted) - 0x4b400000u + 256u;
  const auto half = biased >> 1;
  const auto low = V::from_bits((half - 1u) << 23);
  const auto high = V::from_bits((biased - half - 1u) << 23);
  return polynomial<V>(r, kTaylor) * low * high;
}

// Below 0.65 an odd polynomial (relative error 6e-9), above it 1 - 2 / (e^2x + 1).
template <class V>
typename V::F tanh(typename V::F x) {
  constexpr float kOdd[] = {-0.3333322927f, 0.1333041515f, -0.0536652805f, 0.02041519339f,
                            -0.005468268009f};
  const auto square = x * x;
  const auto near = V::fma(x * square, polynomial<V>(square, kOdd), x);
  const auto size = V::abs(x);
  const auto far = 1.0f - 2.0f / (exp<V>(size + size) + 1.0f);
  return V::select(size < V::broadcast(0.65f), near, V::select(x < V::broadcast(0.0f), -far, far));
}

// The probability that a standard normal variable is below x.  With t = 1 / (1 + 0.3 |x|), e^(-x^2
// / 2) t times a polynomial in t is the probability of the tail; its relative error is 4e-9 up to
// |x| = 14, where e^(-x^2 / 2) is 0.
template <class V>
typename V::F normal_cdf(typename V::F x) {
  constexpr float kTail[] = {0.1196866341f,  0.1195728409f,   0.1102273263f, 0.07842556789f,
                             0.09605786541f, -0.07924741065f, 0.1915817841f, -0.228067584f,
                             0.1123758094f,  -0.0206128353f};
  const auto t = 1.0f / V::fma(V::abs(x), V::broadcast(0.3f), V::broadcast(1.0f));
  const auto tail = exp<V>(x * x * -0.5f) * t * polynomial<V>(t, kTail);
  return V::select(x < V::broadcast(0.0f), tail, 1.0f - tail);
}

}  // namespace nudging::cpu
