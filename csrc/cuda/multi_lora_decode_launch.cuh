// Launches of the kernel for one dtype; a file for each dtype, so that they compile side by side.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "multi_lora_decode.cuh"

namespace clp::cuda {

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that it is not reported again by whoever asks next
  throw std::runtime_error(what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

inline std::string describe(const MultiLoraDecode& call) {
  std::string n;
  for (int i = 0; i < call.layers; ++i) n += (i ? " + " : "") + std::to_string(call.layer[i].n);
  return "multi_lora_linear (cuda): x (" + std::to_string(call.rows) + ", " + std::to_string(call.k) + "), weight (" + n + ", " +
         std::to_string(call.k) + "), rank " + std::to_string(call.rank);
}

// Once per kernel and device: more than 48 KB of shared memory, and that a block fits. Neither touches a stream, so it may
// happen during capture.
template <class K>
void prepare(void (*kernel)(MultiLoraDecode, int), const MultiLoraDecode& call) {
  static std::atomic<uint64_t> ready{0};
  int device = 0;
  check(cudaGetDevice(&device), describe(call));
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (ready.load(std::memory_order_acquire) & bit) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kSharedBytes), describe(call));
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, K::kSharedBytes), describe(call));
  if (blocks < 1)
    throw std::runtime_error(describe(call) + ": no block fits on a multiprocessor, with " + std::to_string(K::kSharedBytes) +
                             " bytes of shared memory and " + std::to_string(kThreads) + " threads");
  ready.fetch_or(bit, std::memory_order_release);
}

template <class T>
void launch(const MultiLoraDecode& call, int sms, cudaStream_t stream) {
  with_kernel(call, [&](auto columns, auto aligned) {
    using K = MultiLoraDecodeKernel<T, decltype(columns)::value, decltype(aligned)::value>;
    const auto kernel = &multi_lora_decode_kernel<T, decltype(columns)::value, decltype(aligned)::value>;
    prepare<K>(kernel, call);
    void* arguments[] = {const_cast<MultiLoraDecode*>(&call), &sms};
    const Plan plan(call, sms);
    check(cudaLaunchCooperativeKernel(kernel, dim3(plan.grid), dim3(kThreads), arguments, K::kSharedBytes, stream),
          describe(call));
  });
}

void launch_bf16(const MultiLoraDecode& call, int sms, cudaStream_t stream);
void launch_f16(const MultiLoraDecode& call, int sms, cudaStream_t stream);

}  // namespace clp::cuda
