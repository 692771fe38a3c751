// The ops' outside: which instruction set, what is refused, how the work is parted among threads.
#include <cstring>

#include "check.h"
#include "kernels.h"
#include "nudging/cpu.h"
#include "parallel.h"

namespace nudging {
namespace {

using cpu::Kernels;
using cpu::parallel;
using cpu::refuse;

const Kernels& kernels(Isa isa) {
#ifdef NUDGING_X86
  if (isa == Isa::avx512bf16) return cpu::kAvx512Bf16;
  if (isa == Isa::avx512) return cpu::kAvx512;
  if (isa == Isa::avx2) return cpu::kAvx2;
#endif
  if (isa != Isa::portable)
    refuse("instruction set ", static_cast<int>(isa), " was not built for this processor");
  return cpu::kPortable;
}

// Every position has its line in the tables, which turn no more channels than there are.
template <class Args>
void check_angles(const char* op, const Args& a) {
  if (2 * a.half > a.head_dim)
    refuse(op, ": the table turns ", 2 * a.half, " channels, a head has ", a.head_dim);
  for (std::int64_t row = 0; row < a.rows; ++row) {
    if (a.positions[row] < 0 || a.positions[row] >= a.max_position) {
      refuse(op, ": row ", row, " has position ", a.positions[row], ", the table ends before ",
             a.max_position);
    }
  }
}

template <class Args>
void check_slots(const char* op, const Args& a) {
  for (std::int64_t row = 0; row < a.rows; ++row) {
    if (a.slot_mapping[row] < 0 || a.slot_mapping[row] >= a.slots) {
      refuse(op, ": row ", row, " goes to slot ", a.slot_mapping[row], ", the cache has ", a.slots,
             " slots");
    }
  }
}

// Sequences own consecutive rows, and only block-table entries that some row sees are looked at.
void check_sequence(const PagedAttention& a, std::int64_t seq) {
  const std::int64_t first_row = a.cu_seqlens_q[seq], end_row = a.cu_seqlens_q[seq + 1],
                     length = a.seq_lens[seq];
  const std::int64_t rows = end_row - first_row;
  if (rows < 0)
    refuse("paged_attention: cu_seqlens_q falls from ", first_row, " to ", end_row, " at sequence ",
           seq);
  if (rows == 0) return;
  if (length < rows)
    refuse("paged_attention: sequence ", seq, " has ", rows, " rows but a length of ", length);
  if (length > a.max_blocks * a.block_size) {
    refuse("paged_attention: sequence ", seq, " has length ", length, ", its block table holds ",
           a.max_blocks, " blocks of ", a.block_size);
  }
  const std::int64_t oldest = length - rows;
  const std::int64_t first_seen = a.window > 0 && oldest >= a.window ? oldest - a.window + 1 : 0;
  for (std::int64_t entry = first_seen / a.block_size; entry * a.block_size < length; ++entry) {
    const std::int32_t block = a.block_tables[seq * a.max_blocks + entry];
    if (block < 0 || block >= a.num_blocks) {
      refuse("paged_attention: block table entry ", entry, " of sequence ", seq, " is ", block,
             ", the cache has ", a.num_blocks, " blocks");
    }
  }
}

}  // namespace

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
#ifdef NUDGING_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) isas.push_back(Isa::avx512bf16);
    isas.push_back(Isa::avx512);
  }
  if (avx2) isas.push_back(Isa::avx2);
#endif
  isas.push_back(Isa::portable);
  return isas;
}

void linear(const Linear& a, Isa isa, int threads) {
  if (a.out_dtype != a.dtype && a.out_dtype != DType::f32)
    refuse("linear: out_dtype is neither x's dtype nor fp32");

  parallel((a.cols + kLinearPanel - 1) / kLinearPanel, a.rows * a.in * a.cols, threads,
           [&](auto begin, auto end) { kernels(isa).linear(a, begin, end); });
}

void rms_norm(const RmsNorm& a, Isa isa, int threads) {
  parallel(a.rows, a.rows * a.dim, threads,
           [&](auto begin, auto end) { kernels(isa).rms_norm(a, begin, end); });
}

void layer_norm(const LayerNorm& a, Isa isa, int threads) {
  parallel(a.rows, a.rows * a.dim, threads,
           [&](auto begin, auto end) { kernels(isa).layer_norm(a, begin, end); });
}

void rope(const Rope& a, Isa isa, int threads) {
  check_angles("rope", a);
  parallel(a.rows, a.rows * a.heads * a.head_dim, threads,
           [&](auto begin, auto end) { kernels(isa).rope(a, begin, end); });
}

void rope_append(const RopeAppend& a, Isa isa, int threads) {
  check_angles("rope_append", a);
  check_slots("rope_append", a);
  parallel(a.rows, a.rows * (a.heads + 2 * a.kv_heads) * a.head_dim, threads,
           [&](auto begin, auto end) { kernels(isa).rope_append(a, begin, end); });
}

void gated_act(const GatedAct& a, Isa isa, int threads) {
  parallel(a.rows, a.rows * a.dim * 8, threads,
           [&](auto begin, auto end) { kernels(isa).gated_act(a, begin, end); });
}

void soft_cap(const SoftCap& a, Isa isa, int threads) {
  if (!(a.cap > 0)) refuse("soft_cap: cap is ", a.cap, ", it must be above 0");
  parallel(a.size, a.size * 8, threads,
           [&](auto begin, auto end) { kernels(isa).soft_cap(a, begin, end); });
}

void kv_append(const KvAppend& a, int threads) {
  check_slots("kv_append", a);
  const auto copy = [&](const void* from, void* to, std::int64_t row) {
    std::memcpy(static_cast<char*>(to) + a.slot_mapping[row] * a.row_bytes,
                static_cast<const char*>(from) + row * a.row_bytes,
                static_cast<std::size_t>(a.row_bytes));
  };
  parallel(a.rows, a.rows * a.row_bytes / 4, threads, [&](auto begin, auto end) {
    for (std::int64_t row = begin; row < end; ++row) {
      copy(a.k, a.k_cache, row);
      copy(a.v, a.v_cache, row);
    }
  });
}

void paged_attention(const PagedAttention& a, Isa isa, int threads) {
  if (a.head_dim > kMaxHeadDim)
    refuse("paged_attention: head_dim is ", a.head_dim, ", at most ", kMaxHeadDim);
  if (a.kv_heads < 1 || a.heads % a.kv_heads != 0) {
    refuse("paged_attention: ", a.heads, " heads are not a multiple of ", a.kv_heads, " kv heads");
  }
  if (a.window < 0) refuse("paged_attention: window is ", a.window, ", it must be 0 (all) or more");
  if (a.cu_seqlens_q[0] != 0 || a.cu_seqlens_q[a.seqs] != a.rows) {
    refuse("paged_attention: cu_seqlens_q goes from ", a.cu_seqlens_q[0], " to ",
           a.cu_seqlens_q[a.seqs], ", the rows from 0 to ", a.rows);
  }
  std::int64_t keys = 0;
  for (std::int64_t seq = 0; seq < a.seqs; ++seq) {
    check_sequence(a, seq);
    keys += (a.cu_seqlens_q[seq + 1] - a.cu_seqlens_q[seq]) *
            static_cast<std::int64_t>(a.seq_lens[seq]);
  }
  const std::int64_t group = a.heads / a.kv_heads;
  const std::int64_t per_group = (group + kAttentionHeads - 1) / kAttentionHeads;
  parallel(a.rows * a.kv_heads * per_group, keys * a.heads * a.head_dim * 2, threads,
           [&](auto begin, auto end) { kernels(isa).paged_attention(a, begin, end); });
}

void softmax_stats(const SoftmaxStats& a, Isa isa, int threads) {
  if (a.vocab < 1 || a.vocab > INT32_MAX)
    refuse("softmax_stats: vocab is ", a.vocab, ", from 1 to ", INT32_MAX);
  parallel(a.rows, a.rows * a.vocab * 8, threads,
           [&](auto begin, auto end) { kernels(isa).softmax_stats(a, begin, end); });
}

}  // namespace nudging
