// One table of functions per instruction set.  Each works on a part [begin, end) of its op, checks
// nothing and throws nothing; what a part is stands above the function.  A table may take single
// functions from elsewhere than the templates: a matrix unit (AMX) would bring a linear of its own.
#pragma once

#include "nudging/cpu.h"

namespace nudging::cpu {

template <class Args>
using Part = void (*)(const Args& args, std::int64_t begin, std::int64_t end);

struct Kernels {
  Part<Linear> linear;
  Part<RmsNorm> rms_norm;
  Part<LayerNorm> layer_norm;
  Part<Rope> rope;
  Part<GatedAct> gated_act;
  Part<SoftCap> soft_cap;
  Part<Add> add;
  Part<RopeAppend> rope_append;
  Part<PagedAttention> paged_attention;
  Part<SoftmaxStats> softmax_stats;
};

extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

// Throws std::invalid_argument for an instruction set that was not built.
const Kernels& kernels(Isa isa);

}  // namespace nudging::cpu
