// The ops' outside: which instruction set, what is refused, how the work is parted among threads.
#include <cstring>

#include "kernels.h"
#include "metadata.h"
#include "span.h"

namespace nudging {
namespace cpu {

const Kernels& kernels(Isa isa) {
#ifdef NUDGING_X86
  if (isa == Isa::avx512bf16) return kAvx512Bf16;
  if (isa == Isa::avx512) return kAvx512;
  if (isa == Isa::avx2) return kAvx2;
#endif
  if (isa != Isa::portable)
    refuse("instruction set ", static_cast<int>(isa), " was not built for this processor");
  return kPortable;
}

}  // namespace cpu

namespace {

using cpu::check_angles;
using cpu::check_attention;
using cpu::check_slots;
using cpu::kernels;
using cpu::refuse;

template <class Args>
void run(const Args& args, cpu::Part<Args> part, Team& team) {
  const Span span = cpu::span(args);
  team.run(span, [&](Worker& worker) {
    worker.share(span, [&](auto begin, auto end) { part(args, begin, end); });
  });
}

// Rows [begin, end): bytes, whatever the dtype.
void copy_rows(const KvAppend& a, std::int64_t begin, std::int64_t end) {
  const auto copy = [&](const void* from, void* to, std::int64_t row) {
    std::memcpy(static_cast<char*>(to) + a.slot_mapping[row] * a.row_bytes,
                static_cast<const char*>(from) + row * a.row_bytes,
                static_cast<std::size_t>(a.row_bytes));
  };
  for (std::int64_t row = begin; row < end; ++row) {
    copy(a.k, a.k_cache, row);
    copy(a.v, a.v_cache, row);
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

void linear(const Linear& a, Isa isa, Team& team) {
  if (a.out_dtype != a.dtype && a.out_dtype != DType::f32)
    refuse("linear: out_dtype is neither x's dtype nor fp32");
  run(a, kernels(isa).linear, team);
}

void rms_norm(const RmsNorm& a, Isa isa, Team& team) { run(a, kernels(isa).rms_norm, team); }

void layer_norm(const LayerNorm& a, Isa isa, Team& team) { run(a, kernels(isa).layer_norm, team); }

void rope(const Rope& a, Isa isa, Team& team) {
  check_angles("rope", a);
  run(a, kernels(isa).rope, team);
}

void rope_append(const RopeAppend& a, Isa isa, Team& team) {
  check_angles("rope_append", a);
  check_slots("rope_append", a);
  run(a, kernels(isa).rope_append, team);
}

void gated_act(const GatedAct& a, Isa isa, Team& team) { run(a, kernels(isa).gated_act, team); }

void soft_cap(const SoftCap& a, Isa isa, Team& team) {
  if (!(a.cap > 0)) refuse("soft_cap: cap is ", a.cap, ", it must be above 0");
  run(a, kernels(isa).soft_cap, team);
}

void kv_append(const KvAppend& a, Team& team) {
  check_slots("kv_append", a);
  run(a, copy_rows, team);
}

void paged_attention(const PagedAttention& a, Isa isa, Team& team) {
  check_attention(a);
  run(a, kernels(isa).paged_attention, team);
}

void softmax_stats(const SoftmaxStats& a, Isa isa, Team& team) {
  if (a.vocab < 1 || a.vocab > INT32_MAX)
    refuse("softmax_stats: vocab is ", a.vocab, ", from 1 to ", INT32_MAX);
  run(a, kernels(isa).softmax_stats, team);
}

}  // namespace nudging
