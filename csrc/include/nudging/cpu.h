// The row-invariant CPU ops on raw pointers.  Formulas and shapes are those of the references in
// kernels/.
//
// Every element of a result is one reduction in an order that only the instruction set decides:
// never the number of rows, their neighbours or the threads.  All arrays are dense, the last
// dimension innermost.
#pragma once

#include <cstdint>
#include <vector>

#include "nudging/team.h"

namespace nudging {

enum class Isa { portable, avx2, avx512, avx512bf16 };

enum class DType { f32, bf16, f16 };

enum class Activation { silu, gelu, gelu_tanh };

// The widest query head that attention keeps on its stack.
constexpr std::int64_t kMaxHeadDim = 512;

// Query heads of one group that attention computes together.
constexpr std::int64_t kAttentionHeads = 4;

// Columns of a panel of a packed weight.
constexpr std::int64_t kLinearPanel = 16;

struct Linear {
  const void* x;        // [rows, in]
  const void* weight;   // [cols, in], int8 where there are scales; or packed: see pack_weight
  const float* scales;  // [cols], each column's products are multiplied by its own; or null
  const void* bias;     // [cols] or null
  void* out;            // [rows, cols] of out_dtype, which is dtype or f32
  std::int64_t rows, in, cols;
  DType dtype, out_dtype;
  bool is_packed;
};

// What a weight consists of.
enum class WeightType { f32, bf16, f16, int8 };

struct RmsNorm {
  const void* x;       // [rows, dim]
  const void* y;       // [rows, dim], added to x before; or null
  void* sum;           // [rows, dim], what x + y is, where there is a y
  const void* weight;  // [dim]
  void* out;           // [rows, dim]
  std::int64_t rows, dim;
  // Rows come in groups, dense within, that begin `stride` elements apart: in all arrays alike.
  std::int64_t group, stride;
  float eps;
  bool unit_offset;
  DType dtype;
};

struct Add {
  const void* x;  // [size]
  const void* y;  // [size]
  void* out;      // [size]
  std::int64_t size;
  DType dtype;
};

struct LayerNorm {
  const void* x;  // [rows, dim]
  void* out;      // [rows, dim]
  std::int64_t rows, dim;
  float eps;
  DType dtype;
};

struct Rope {
  const void* x;                  // [rows, heads, head_dim]
  const std::int64_t* positions;  // [rows]
  const float* cos;               // [max_position, half]
  const float* sin;               // [max_position, half]
  void* out;                      // [rows, heads, head_dim]
  std::int64_t rows, heads, head_dim, half, max_position;
  DType dtype;
};

struct GatedAct {
  const void* gate_up;  // [rows, 2 * dim]
  void* out;            // [rows, dim]
  std::int64_t rows, dim;
  Activation activation;
  DType dtype;
};

struct SoftCap {
  const void* logits;  // [size]
  void* out;           // [size]
  std::int64_t size;
  float cap;
  DType dtype;
};

struct KvAppend {
  const void* k;                     // [rows, row_bytes]
  const void* v;                     // [rows, row_bytes]
  void* k_cache;                     // [slots, row_bytes]
  void* v_cache;                     // [slots, row_bytes]
  const std::int64_t* slot_mapping;  // [rows]
  std::int64_t rows, row_bytes, slots;
};

// Rope of queries and keys, the keys and values going straight into the cache.
struct RopeAppend {
  const void* q;  // [rows, heads, head_dim], rows `q_stride` elements apart
  const void* k;  // [rows, kv_heads, head_dim], likewise
  const void* v;  // [rows, kv_heads, head_dim], likewise
  std::int64_t q_stride, k_stride, v_stride;
  const std::int64_t* positions;     // [rows]
  const float* cos;                  // [max_position, half]
  const float* sin;                  // [max_position, half]
  void* q_out;                       // [rows, heads, head_dim]
  void* k_cache;                     // [slots, kv_heads, head_dim]
  void* v_cache;                     // [slots, kv_heads, head_dim]
  const std::int64_t* slot_mapping;  // [rows]
  std::int64_t rows, heads, kv_heads, head_dim, half, max_position, slots;
  DType dtype;
};

struct PagedAttention {
  const void* q;                     // [rows, heads, head_dim]
  const void* k_cache;               // [num_blocks, block_size, kv_heads, head_dim]
  const void* v_cache;               // [num_blocks, block_size, kv_heads, head_dim]
  void* out;                         // [rows, heads, head_dim]
  const std::int32_t* block_tables;  // [seqs, max_blocks]
  const std::int32_t* cu_seqlens_q;  // [seqs + 1]
  const std::int32_t* seq_lens;      // [seqs]
  std::int64_t rows, seqs, heads, kv_heads, head_dim, num_blocks, block_size, max_blocks;
  float scale;
  std::int64_t window;  // 0: all
  float soft_cap;       // 0: none
  DType dtype;
};

struct SoftmaxStats {
  const void* logits;    // [rows, vocab]
  float* max;            // [rows]
  float* lse;            // [rows]
  std::int32_t* argmax;  // [rows]
  float* entropy;        // [rows]
  std::int64_t rows, vocab;
  DType dtype;
};

// What this processor can run, best first; the last is always `portable`.
std::vector<Isa> available_isas();

// The weight [cols, in] in place as linear reads it best: in panels of kLinearPanel columns, the
// memory behind it filled up with zeros to a whole panel.
void pack_weight(void* weight, WeightType type, std::int64_t in, std::int64_t cols, Team& team);

// Columns ids[0], ... of a packed weight, out: [count, in].  Throws std::invalid_argument for an id
// outside of [0, cols).
void unpack_columns(const void* weight, WeightType type, std::int64_t in, std::int64_t cols,
                    const std::int64_t* ids, std::int64_t count, void* out);

// All ops throw std::invalid_argument, naming value and limit, before they write anything.
void linear(const Linear& args, Isa isa, Team& team);
void rms_norm(const RmsNorm& args, Isa isa, Team& team);
void layer_norm(const LayerNorm& args, Isa isa, Team& team);
void rope(const Rope& args, Isa isa, Team& team);
void gated_act(const GatedAct& args, Isa isa, Team& team);
void soft_cap(const SoftCap& args, Isa isa, Team& team);
void kv_append(const KvAppend& args, Team& team);
void rope_append(const RopeAppend& args, Isa isa, Team& team);
void paged_attention(const PagedAttention& args, Isa isa, Team& team);
void softmax_stats(const SoftmaxStats& args, Isa isa, Team& team);

}  // namespace nudging
