// What multi_lora_decode.hpp promises to callers that see no CUDA headers.
#include "multi_lora_decode_launch.cuh"

namespace clp::cuda {

Device device_properties(int device) {
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "CUDA device " + std::to_string(device));
    return value;
  };
  return {get(cudaDevAttrComputeCapabilityMajor), get(cudaDevAttrComputeCapabilityMinor), get(cudaDevAttrMultiProcessorCount),
          get(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

int64_t multi_lora_decode_workspace(int rows, const int64_t* n, int layers, int k, int rank, int sms) {
  return workspace_bytes(rows, n, layers, k, rank, sms);
}

void multi_lora_decode(const MultiLoraDecode& call, Half dtype, int device, int sms, void* stream) {
  if (call.rows < 0 || call.rows > kMaxRows)
    throw std::runtime_error(describe(call) + ": expected at most " + std::to_string(kMaxRows) + " rows");
  if (!call.rows || !Plan::tiles_of(call)) return;
  check(cudaSetDevice(device), describe(call));  // this runtime is linked in, and is not the one that torch told
  (dtype == Half::bf16 ? launch_bf16 : launch_f16)(call, sms, static_cast<cudaStream_t>(stream));
}

}  // namespace clp::cuda
