// The only file that sees pybind11: one m.def per op.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) { m.doc() = "Row-invariant CPU kernels of nudging."; }
