// clp_kernels._native: addresses come in as integers (tensor.data_ptr()), sizes as int64; the caller has checked both.
#include <pybind11/pybind11.h>

#include "kernels.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of clp_kernels. Internal: the checked interface is clp_kernels itself.";
  m.def("isa", [] { return clp::table().name; }, "name of the instruction set in use");
  m.def("select_isa", &clp::select_isa, py::arg("name"), "force an instruction set: portable, avx2 or avx512");
}
