// What every instruction set's file instantiates.
#pragma once

#include "add.h"
#include "gated_act.h"
#include "kernels.h"
#include "layer_norm.h"
#include "linear.h"
#include "paged_attention.h"
#include "rms_norm.h"
#include "rope.h"
#include "soft_cap.h"
#include "softmax_stats.h"

namespace nudging::cpu {

template <class V>
constexpr Kernels kTable{linear<V>,          rms_norm<V>,     layer_norm<V>, rope<V>,
                         gated_act<V>,       soft_cap<V>,     add<V>,        rope_append<V>,
                         paged_attention<V>, softmax_stats<V>};

}  // namespace nudging::cpu
