// What every instruction set's file instantiates.
#pragma once

#include "elementwise.h"
#include "kernels.h"
#include "linear.h"
#include "norms.h"
#include "paged_attention.h"
#include "softmax_stats.h"

namespace nudging::cpu {

template <class V>
constexpr Kernels kTable{linear<V>,    rms_norm<V>, layer_norm<V>,      rope<V>,
                         gated_act<V>, soft_cap<V>, paged_attention<V>, softmax_stats<V>};

}  // namespace nudging::cpu
