// A pass through all layers of a decoder and its head in one call.
//
// What is computed is what engine/models/decoder.py computes op by op, by the same kernels: the
// bits are the same.  One call wakes the team once, where each op alone would do it again.
#pragma once

#include "nudging/cpu.h"

namespace nudging {

enum class QkNorm { none, head, full };

// Of a linear op; `scales` as there, `bias` or null.
struct Projection {
  const void* weight;
  const float* scales;
  const void* bias;
  bool is_packed;
};

// The weights of one layer; null where the model has none.
struct DecoderLayer {
  Projection qkv;      // [(heads + 2 kv_heads) * head_dim, hidden]
  Projection o;        // [hidden, heads * head_dim]
  Projection gate_up;  // [2 * intermediate, hidden]
  Projection down;     // [hidden, intermediate]
  const void *attn_norm, *attn_post_norm, *mlp_norm, *mlp_post_norm, *q_norm, *k_norm;
  const float *cos, *sin;     // [max_position, half]
  std::int64_t half, window;  // window 0: all
};

// A norm of null weights is a layer norm.
struct DecoderModel {
  std::vector<DecoderLayer> layers;
  const void* norm;
  Projection head;  // [vocab, hidden]
  std::int64_t hidden, heads, kv_heads, head_dim, intermediate, vocab, max_position;
  float eps, attention_scale, attention_soft_cap, final_soft_cap;
  bool unit_offset, pre_norm, post_norm;
  QkNorm qk_norm;
  Activation activation;
  DType dtype;
};

struct DecoderBatch {
  const void* x;                     // [rows, hidden], the embeddings
  const std::int64_t* positions;     // [rows]
  const std::int64_t* slot_mapping;  // [rows]
  const std::int32_t* block_tables;  // [seqs, max_blocks]
  const std::int32_t* cu_seqlens_q;  // [seqs + 1]
  const std::int32_t* seq_lens;      // [seqs]
  const std::int64_t* logit_rows;    // [num_logits]
  void* k_cache;                     // [layers, num_blocks, block_size, kv_heads, head_dim]
  void* v_cache;                     // likewise
  float* logits;                     // [num_logits, vocab]
  std::int64_t rows, seqs, max_blocks, num_blocks, block_size, num_logits;
};

// Throws std::invalid_argument, naming value and limit, before it writes anything.
void decode(const DecoderModel& model, const DecoderBatch& batch, Isa isa, Team& team);

}  // namespace nudging
