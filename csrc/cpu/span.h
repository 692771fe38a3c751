// How each op can be parted: what a part is stands above its kernel.
#pragma once

#include "nudging/cpu.h"

namespace nudging::cpu {

inline Span span(const Linear& a) {
  return {(a.cols + kLinearPanel - 1) / kLinearPanel, a.rows * a.in * a.cols};
}

inline Span span(const RmsNorm& a) { return {a.rows, a.rows * a.dim}; }

inline Span span(const LayerNorm& a) { return {a.rows, a.rows * a.dim}; }

inline Span span(const Rope& a) { return {a.rows, a.rows * a.heads * a.head_dim}; }

inline Span span(const RopeAppend& a) {
  return {a.rows, a.rows * (a.heads + 2 * a.kv_heads) * a.head_dim};
}

inline Span span(const GatedAct& a) { return {a.rows, a.rows * a.dim * 8}; }

inline Span span(const SoftCap& a) { return {a.size, a.size * 8}; }

inline Span span(const Add& a) { return {a.size, a.size}; }

inline Span span(const KvAppend& a) { return {a.rows, a.rows * a.row_bytes / 4}; }

inline Span span(const PagedAttention& a) {
  const std::int64_t group = a.heads / a.kv_heads;
  const std::int64_t per_group = (group + kAttentionHeads - 1) / kAttentionHeads;
  std::int64_t keys = 0;
  for (std::int64_t seq = 0; seq < a.seqs; ++seq) {
    keys += (a.cu_seqlens_q[seq + 1] - a.cu_seqlens_q[seq]) *
            static_cast<std::int64_t>(a.seq_lens[seq]);
  }
  return {a.rows * a.kv_heads * per_group, keys * a.heads * a.head_dim * 2};
}

inline Span span(const SoftmaxStats& a) { return {a.rows, a.rows * a.vocab * 8}; }

}  // namespace nudging::cpu
