// The CUDA part of clp_kernels._native: addresses as integers, as in csrc/cpu/bindings.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "multi_lora_decode.hpp"

namespace py = pybind11;

namespace clp {

namespace {

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

// (weight, lora_a, lora_b, bias, y, stride_weight, stride_a, stride_b, n)
using LayerFields =
    std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>;

void multi_lora_decode(uintptr_t x, uintptr_t gate, uintptr_t gate_index, uintptr_t workspace, int64_t stride_x, int rows, int k,
                       int rank, int groups, bool gate_is_float, bool index_is_64, const std::vector<LayerFields>& layers,
                       int dtype, int device, int sms, uintptr_t stream) {
  if (layers.size() > cuda::kMaxLayers) throw std::runtime_error("multi_lora_decode: too many layers");
  cuda::MultiLoraDecode call{at(x), at(gate),  at(gate_index), at(workspace), stride_x,    rows, k, rank,
                             groups, int(layers.size()), gate_is_float, index_is_64, {}};
  int count = 0;
  for (const auto& [weight, a, b, bias, y, stride_weight, stride_a, stride_b, n] : layers)
    call.layer[count++] = {at(weight), at(a), at(b), at(bias), at(y), stride_weight, stride_a, stride_b, n};
  cuda::multi_lora_decode(call, cuda::Half(dtype), device, sms, at(stream));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_properties", [](int device) {
    const cuda::Device p = cuda::device_properties(device);
    return std::make_tuple(p.major, p.minor, p.sms, p.shared_per_block);
  });
  m.def("multi_lora_decode_workspace", [](int rows, const std::vector<int64_t>& n, int k, int rank, int sms) {
    return cuda::multi_lora_decode_workspace(rows, n.data(), int(n.size()), k, rank, sms);
  });
  m.def("multi_lora_decode", &multi_lora_decode);
}

}  // namespace clp
