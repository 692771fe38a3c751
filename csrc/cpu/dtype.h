// From a dtype known at run time to a type known at compile time.
#pragma once

#include "nudging/cpu.h"
#include "vec.h"

namespace nudging::cpu {

// Call body with a value of the element type.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
  }
}

}  // namespace nudging::cpu
