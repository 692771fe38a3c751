#pragma once

#include <math.h>

#include "dtype.h"
#include "math.h"

namespace nudging::cpu {

struct Top {
  float max;
  std::int32_t argmax;
};

// The largest entry and its lowest index.  The first NaN, if there is one, is the largest, as in
// torch.
template <class V, class T>
Top find_top(const T* logits, std::int64_t vocab) {
  typename V::F best = V::broadcast(-kInf);
  typename V::I at{}, index = V::iota(), is_nan{};
  for (std::int64_t i = 0; i < vocab; i += V::kLanes) {
    // Lanes past the end hold 0, which could win: give them what never does.
    const auto x =
        V::select(V::first(vocab - i), V::load(logits + i, vocab - i), V::broadcast(-kInf));
    const typename V::I better = x > best;
    best = V::select(better, x, best);
    at = V::select(better, index, at);
    is_nan = is_nan | (x != x);
    index = index + V::kLanes;
  }
  for (int lane = 0; lane < V::kLanes; ++lane) {
    if (is_nan[lane] == 0) continue;
    for (std::int64_t i = 0; i < vocab; ++i) {
      const float x = V::load(logits + i, 1)[0];
      if (x != x) return {x, static_cast<std::int32_t>(i)};
    }
  }
  Top top{V::max(best), std::numeric_limits<std::int32_t>::max()};
  for (int lane = 0; lane < V::kLanes; ++lane) {
    if (best[lane] == top.max && at[lane] < top.argmax) top.argmax = at[lane];
  }
  return top;
}

// The sums of p and of p * (x - max) over some logits, where p = e^(x - max).
template <class V>
struct Sums {
  typename V::F p{}, weighted{};
};

// Long sums are sums of sums of this many logits, which keeps rounding errors small.
constexpr std::int64_t kStretch = 1024;

template <class V, class T>
Sums<V> sum_stretch(const T* logits, std::int64_t size, float max) {
  Sums<V> sums;
  for (std::int64_t i = 0; i < size; i += V::kLanes) {
    const auto below = V::load(logits + i, size - i) - max;
    const auto p = V::select(V::first(size - i), exp<V>(below), typename V::F{});
    sums.p = sums.p + p;
    // Where p is 0, `below` may be -inf.
    sums.weighted = V::fma(p, V::select(p > typename V::F{}, below, p), sums.weighted);
  }
  return sums;
}

template <class V, class T>
void softmax_stats_row(const SoftmaxStats& a, const T* logits, std::int64_t row) {
  const Top top = find_top<V>(logits, a.vocab);
  a.max[row] = top.max;
  a.argmax[row] = top.argmax;
  // A row whose maximum is infinite or NaN has no softmax.
  a.lse[row] = a.entropy[row] = top.max;
  if (top.max - top.max != 0.0f) return;
  Sums<V> total;
  for (std::int64_t i = 0; i < a.vocab; i += kStretch) {
    const std::int64_t size = a.vocab - i < kStretch ? a.vocab - i : kStretch;
    const Sums<V> part = sum_stretch<V>(logits + i, size, top.max);
    total.p = total.p + part.p;
    total.weighted = total.weighted + part.weighted;
  }
  const float sum = V::sum(total.p), log_sum = ::logf(sum);
  a.lse[row] = top.max + log_sum;
  a.entropy[row] = log_sum - V::sum(total.weighted) / sum;
}

// Rows [begin, end).
template <class V>
void softmax_stats(const SoftmaxStats& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (std::int64_t row = begin; row < end; ++row) {
      softmax_stats_row<V>(a, static_cast<const T*>(a.logits) + row * a.vocab, row);
    }
  });
}

}  // namespace nudging::cpu
