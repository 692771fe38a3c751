#pragma once

#include <pybind11/pybind11.h>

namespace nudging {

void bind_fast_path(pybind11::module_& m);

}  // namespace nudging
