#pragma once

#include "dot.h"
#include "dtype.h"
#include "math.h"
#include "soft_cap.h"

namespace nudging::cpu {

// Keys are taken in runs of this many that begin at multiples of it, counted from the sequence's
// first token: where a run begins depends neither on the window nor on the rows of this call.
constexpr std::int64_t kRun = 64;

// One query row of one head: the positions [first, last] that it sees, and where they lie.
template <class V, class T>
struct AttentionRow {
  const PagedAttention& a;
  const std::int32_t* blocks;
  std::int64_t kv_head, first, last;

  const T* at(const void* cache, std::int64_t position) const {
    const std::int64_t slot =
        blocks[position / a.block_size] * a.block_size + position % a.block_size;
    return static_cast<const T*>(cache) + (slot * a.kv_heads + kv_head) * a.head_dim;
  }

  // The capped logits of the run at `start`; -inf where the row does not see.
  void logits(const float* q, std::int64_t start, float (&out)[kRun]) const {
    const std::int64_t begin = first > start ? first - start : 0;
    const std::int64_t end = last - start < kRun ? last - start + 1 : kRun;
    float raw[kRun] = {};
    for (std::int64_t i = begin / kTileCols * kTileCols; i < end; i += kTileCols) {
      const T* keys[kTileCols];
      for (std::int64_t c = 0; c < kTileCols; ++c) {
        // A key that is not seen is not read: a seen one stands in for it.
        const std::int64_t seen = i + c < begin ? begin : (i + c < end ? i + c : end - 1);
        keys[c] = at(a.k_cache, start + seen);
      }
      float dots[1][kTileCols];
      dot_tile<V, 1>({q}, keys, a.head_dim, [](std::int64_t) {}, dots);
      for (int c = 0; c < kTileCols; ++c) raw[i + c] = dots[0][c];
    }
    for (std::int64_t i = 0; i < kRun; i += V::kLanes) {
      auto x = V::load_full(raw + i) * a.scale;
      if (a.soft_cap > 0) x = cap_logits<V>(x, a.soft_cap);
      x = V::select(V::first(end - i) & ~V::first(begin - i), x, V::broadcast(-kInf));
      V::store_full(out + i, x);
    }
  }

  // total = total * decay + sum of weight * value over the run's seen keys, in the keys' order.
  void add_values(const float (&weights)[kRun], float decay, std::int64_t start,
                  float* total) const {
    const std::int64_t begin = first > start ? first - start : 0;
    const std::int64_t end = last - start < kRun ? last - start + 1 : kRun;
    const T* values[kRun];
    for (std::int64_t i = begin; i < end; ++i) values[i] = at(a.v_cache, start + i);
    for (std::int64_t d = 0; d < a.head_dim; d += V::kLanes) {
      auto sum = V::load(total + d, a.head_dim - d) * decay;
      for (std::int64_t i = begin; i < end; ++i) {
        sum = V::fma(V::broadcast(weights[i]), V::load(values[i] + d, a.head_dim - d), sum);
      }
      V::store(total + d, sum, a.head_dim - d);
    }
  }

  // Softmax on the go: the sums so far are relative to the largest logit so far.
  void run(const T* query, T* out) const {
    float q[kMaxHeadDim], total[kMaxHeadDim] = {}, weights[kRun];
    for (std::int64_t d = 0; d < a.head_dim; d += V::kLanes) {
      V::store(q + d, V::load(query + d, a.head_dim - d), a.head_dim - d);
    }
    float top = -kInf, sum = 0;
    for (std::int64_t start = first / kRun * kRun; start <= last; start += kRun) {
      logits(q, start, weights);
      float new_top = top;
      for (std::int64_t i = 0; i < kRun; i += V::kLanes) {
        const float here = V::max(V::load_full(weights + i));
        new_top = here > new_top ? here : new_top;
      }
      // While every logit is -inf there is nothing to be relative to, and -inf - -inf would be NaN.
      const float zero = new_top == -kInf ? 0.0f : new_top;
      const float decay = exp<V>(V::broadcast(top - zero))[0];
      typename V::F run_sum{};
      for (std::int64_t i = 0; i < kRun; i += V::kLanes) {
        const auto weight = exp<V>(V::load_full(weights + i) - zero);
        run_sum = run_sum + weight;
        V::store_full(weights + i, weight);
      }
      sum = sum * decay + V::sum(run_sum);
      add_values(weights, decay, start, total);
      top = new_top;
    }
    for (std::int64_t d = 0; d < a.head_dim; d += V::kLanes) {
      V::store(out + d, V::load(total + d, a.head_dim - d) / sum, a.head_dim - d);
    }
  }
};

// Heads [begin, end) of all rows, counted row by row.
template <class V>
void paged_attention(const PagedAttention& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    std::int64_t seq = 0;
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t row = task / a.heads, head = task % a.heads;
      while (a.cu_seqlens_q[seq + 1] <= row) ++seq;
      const std::int64_t last = a.seq_lens[seq] - a.cu_seqlens_q[seq + 1] + row;
      const std::int64_t first = a.window > 0 && last >= a.window ? last - a.window + 1 : 0;
      const std::int64_t kv_head = head / (a.heads / a.kv_heads);
      const AttentionRow<V, T> one{a, a.block_tables + seq * a.max_blocks, kv_head, first, last};
      one.run(static_cast<const T*>(a.q) + task * a.head_dim,
              static_cast<T*>(a.out) + task * a.head_dim);
    }
  });
}

}  // namespace nudging::cpu
