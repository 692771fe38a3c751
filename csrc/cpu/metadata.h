// What a batch says of its rows is checked before anything is read or written by it.
#pragma once

#include "check.h"
#include "nudging/cpu.h"

namespace nudging::cpu {

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
inline void check_sequence(const PagedAttention& a, std::int64_t seq) {
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

inline void check_attention(const PagedAttention& a) {
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
  for (std::int64_t seq = 0; seq < a.seqs; ++seq) check_sequence(a, seq);
}

}  // namespace nudging::cpu
