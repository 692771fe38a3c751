#pragma once

#include <pybind11/pybind11.h>

namespace nudging {

void bind_lanes(pybind11::module_& m);

}  // namespace nudging
