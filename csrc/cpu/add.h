#pragma once

#include "dtype.h"

namespace nudging::cpu {

// Elements [begin, end): the sum, rounded.
template <class V>
void add(const Add& a, std::int64_t begin, std::int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T *x = static_cast<const T*>(a.x), *y = static_cast<const T*>(a.y);
    T* out = static_cast<T*>(a.out);
    for (std::int64_t i = begin; i < end; i += V::kLanes) {
      V::store(out + i, V::load(x + i, end - i) + V::load(y + i, end - i), end - i);
    }
  });
}

}  // namespace nudging::cpu
