// The CUDA part of clp_kernels._native: addresses as integers, as in csrc/cpu/bindings.cpp.
#include <pybind11/pybind11.h>

#include <tuple>

#include "multi_lora_decode.hpp"

namespace py = pybind11;

namespace clp {

namespace {

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

void multi_lora_decode(uintptr_t x, uintptr_t weight, uintptr_t lora_a, uintptr_t lora_b, uintptr_t bias, uintptr_t gate,
                       uintptr_t gate_index, uintptr_t y, uintptr_t workspace, int64_t stride_x, int64_t stride_weight,
                       int64_t stride_a, int64_t stride_b, int rows, int n, int k, int rank, int groups, bool gate_is_float,
                       bool index_is_64, int dtype, int device, int sms, uintptr_t stream) {
  cuda::multi_lora_decode({at(x), at(weight), at(lora_a), at(lora_b), at(bias), at(gate), at(gate_index), at(y),
                           at(workspace), stride_x, stride_weight, stride_a, stride_b, rows, n, k, rank, groups, gate_is_float,
                           index_is_64},
                          cuda::Half(dtype), device, sms, at(stream));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_properties", [](int device) {
    const cuda::Device p = cuda::device_properties(device);
    return std::make_tuple(p.major, p.minor, p.sms, p.shared_per_block);
  });
  m.def("multi_lora_decode_workspace", &cuda::multi_lora_decode_workspace);
  m.def("multi_lora_decode", &multi_lora_decode);
}

}  // namespace clp
