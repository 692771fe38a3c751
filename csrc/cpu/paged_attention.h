#pragma once

#include "dot.h"
#include "dtype.h"
#include "math.h"
#include "soft_cap.h"

namespace nudging::cpu {

// Keys are taken in runs of this many that begin at multiples of it, counted from the sequence's
// first token: where a run begins depends neither on the window nor on the rows of this call.
constexpr std::int64_t kRun = 64;

// kHeads query heads of one row that share one key-value head, so that each key and value is read
// once for all of them; what is computed for a head is what would be computed for it alone.
template <class V, class T, int kHeads>
struct AttentionRow {
  const PagedAttention& a;
  const std::int32_t* blocks;
  std::int64_t kv_head, first, last;  // the positions [first, last] are seen

  const T* at(const void* cache, std::int64_t position) const {
    const std::int64_t slot =
        blocks[position / a.block_size] * a.block_size + position % a.block_size;
    return static_cast<const T*>(cache) + (slot * a.kv_heads + kv_head) * a.head_dim;
  }

  // The seen part [begin, end) of the run at `start`, counted from there.
  std::int64_t begin(std::int64_t start) const { return first > start ? first - start : 0; }
  std::int64_t end(std::int64_t start) const {
    return last - start < kRun ? last - start + 1 : kRun;
  }

  // The capped logits of the run at `start`; -inf where the row does not see.
  void logits(const float (&q)[kHeads][kMaxHeadDim], std::int64_t start,
              float (&out)[kHeads][kRun]) const {
    const std::int64_t begin = this->begin(start), end = this->end(start);
    const float* queries[kHeads];
    for (int h = 0; h < kHeads; ++h) queries[h] = q[h];
    float raw[kHeads][kRun] = {};
    for (std::int64_t i = begin / kTileCols * kTileCols; i < end; i += kTileCols) {
      const T* keys[kTileCols];
      for (std::int64_t c = 0; c < kTileCols; ++c) {
        // A key that is not seen is not read: a seen one stands in for it.
        const std::int64_t seen = i + c < begin ? begin : (i + c < end ? i + c : end - 1);
        keys[c] = at(a.k_cache, start + seen);
      }
      float dots[kHeads][kTileCols];
      dot_tile<V, kHeads>(queries, keys, a.head_dim, dots);
      for (int h = 0; h < kHeads; ++h) std::memcpy(raw[h] + i, dots[h], sizeof dots[h]);
    }
    for (int h = 0; h < kHeads; ++h) {
      for (std::int64_t i = 0; i < kRun; i += V::kLanes) {
        auto x = V::load_full(raw[h] + i) * a.scale;
        if (a.soft_cap > 0) x = cap_logits<V>(x, a.soft_cap);
        x = V::select(V::first(end - i) & ~V::first(begin - i), x, V::broadcast(-kInf));
        V::store_full(out[h] + i, x);
      }
    }
  }

  // total = total * decay + sum of weight * value over the run's seen keys, in the keys' order.
  void add_values(const float (&weights)[kHeads][kRun], const float (&decay)[kHeads],
                  std::int64_t start, float (&total)[kHeads][kMaxHeadDim]) const {
    const std::int64_t begin = this->begin(start), end = this->end(start);
    const T* values[kRun];
    for (std::int64_t i = begin; i < end; ++i) values[i] = at(a.v_cache, start + i);
    for (std::int64_t d = 0; d < a.head_dim; d += V::kLanes) {
      const std::int64_t left = a.head_dim - d;
      typename V::F sum[kHeads];
      for (int h = 0; h < kHeads; ++h) sum[h] = V::load_full(total[h] + d) * decay[h];
      for (std::int64_t i = begin; i < end; ++i) {
        const auto value = V::load(values[i] + d, left);
        for (int h = 0; h < kHeads; ++h) {
          sum[h] = V::fma(V::broadcast(weights[h][i]), value, sum[h]);
        }
      }
      for (int h = 0; h < kHeads; ++h) V::store_full(total[h] + d, sum[h]);
    }
  }

  // Turns the logits of one head's run into weights relative to the largest logit so far; returns
  // what the sums so far shrink by.
  static float weigh(float (&weights)[kRun], float& top, float& sum) {
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
    top = new_top;
    return decay;
  }

  // Softmax on the go.  query, out: [kHeads, head_dim].
  void run(const T* query, T* out) const {
    // A register may reach past head_dim: those lanes are never stored.
    static_assert(kMaxHeadDim % V::kLanes == 0);
    float q[kHeads][kMaxHeadDim], total[kHeads][kMaxHeadDim], weights[kHeads][kRun];
    float top[kHeads], sum[kHeads] = {}, decay[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      top[h] = -kInf;
      for (std::int64_t d = 0; d < a.head_dim; d += V::kLanes) {
        V::store_full(q[h] + d, V::load(query + h * a.head_dim + d, a.head_dim - d));
        V::store_full(total[h] + d, typename V::F{});
      }
    }
    for (std::int64_t start = first / kRun * kRun; start <= last; start += kRun) {
      logits(q, start, weights);
      for (int h = 0; h < kHeads; ++h) decay[h] = weigh(weights[h], top[h], sum[h]);
      add_values(weights, decay, start, total);
    }
    for (int h = 0; h < kHeads; ++h) {
      for (std::int64_t d = 0; d < a.head_dim; d += V::kLanes) {
        V::store(out + h * a.head_dim + d, V::load_full(total[h] + d) / sum[h], a.head_dim - d);
      }
    }
  }
};

// `count` <= kHeads heads from `head` on, of the row that is `row`th of all.
template <class V, class T, int kHeads>
void attend(const PagedAttention& a, std::int64_t seq, std::int64_t row, std::int64_t head,
            std::int64_t count) {
  if constexpr (kHeads > 1) {
    if (count < kHeads) return attend<V, T, kHeads - 1>(a, seq, row, head, count);
  }
  const std::int64_t last = a.seq_lens[seq] - a.cu_seqlens_q[seq + 1] + row;
  const std::int64_t first = a.window > 0 && last >= a.window ? last - a.window + 1 : 0;
  const std::int64_t kv_head = head / (a.heads / a.kv_heads);
  const AttentionRow<V, T, kHeads> heads{a, a.block_tables + seq * a.max_blocks, kv_head, first,
                                         last};
  const std::int64_t offset = (row * a.heads + head) * a.head_dim;
  heads.run(static_cast<const T*>(a.q) + offset, static_cast<T*>(a.out) + offset);
}

// Tasks [begin, end) of all rows, counted row by row: up to kAttentionHeads heads of a group each.
template <class V>
void paged_attention(const PagedAttention& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const std::int64_t group = a.heads / a.kv_heads;
    const std::int64_t per_group = (group + kAttentionHeads - 1) / kAttentionHeads;
    std::int64_t seq = 0;
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t row = task / (a.kv_heads * per_group);
      const std::int64_t kv_head = task / per_group % a.kv_heads;
      const std::int64_t part = task % per_group * kAttentionHeads;
      while (a.cu_seqlens_q[seq + 1] <= row) ++seq;
      const std::int64_t count = group - part < kAttentionHeads ? group - part : kAttentionHeads;
      attend<V, T, kAttentionHeads>(a, seq, row, kv_head * group + part, count);
    }
  });
}

}  // namespace nudging::cpu
