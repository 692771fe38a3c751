#pragma once

#include "dtype.h"
#include "math.h"

namespace nudging::cpu {

template <class V>
typename V::F cap_logits(typename V::F logits, float cap) {
  return tanh<V>(logits / cap) * cap;
}

// Elements [begin, end) of the flattened logits.
template <class V>
void soft_cap(const SoftCap& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* logits = static_cast<const T*>(a.logits);
    T* out = static_cast<T*>(a.out);
    for (std::int64_t i = begin; i < end; i += V::kLanes) {
      V::store(out + i, cap_logits<V>(V::load(logits + i, end - i), a.cap), end - i);
    }
  });
}

}  // namespace nudging::cpu
