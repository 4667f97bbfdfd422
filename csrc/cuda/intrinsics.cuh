// What the kernels ask of the hardware, by name. tests/kernels/cuda_on_cpu has the same names on a CPU, so that kernel code
// is one text.
#pragma once
#ifdef CLP_CUDA_ON_CPU
#include "cuda_on_cpu.hpp"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define CLP_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define CLP_DEVICE __device__ __forceinline__
#define CLP_BOTH __host__ __device__ __forceinline__
#define CLP_PARAMETER const __grid_constant__
#define CLP_UNROLL _Pragma("unroll")
#define CLP_PRAGMA(text) _Pragma(#text)
#define CLP_UNROLL_BY(count) CLP_PRAGMA(unroll count)

namespace clp::cuda {

// Names of the two formats; memory holds either as uint16_t.
struct Bf16 {};
struct F16 {};

template <class T>
CLP_DEVICE float widen(uint16_t bits);
template <>
CLP_DEVICE float widen<Bf16>(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
template <>
CLP_DEVICE float widen<F16>(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
template <class T>
CLP_DEVICE uint16_t narrow(float value);  // to nearest, ties to even
template <>
CLP_DEVICE uint16_t narrow<Bf16>(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
template <>
CLP_DEVICE uint16_t narrow<F16>(float value) { return __half_as_ushort(__float2half_rn(value)); }

CLP_DEVICE int thread_index() { return threadIdx.x; }
CLP_DEVICE int block_index() { return blockIdx.x; }
CLP_DEVICE void sync_threads() { __syncthreads(); }
CLP_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

// All blocks: what was written before arriving is seen after waiting. Each barrier is waited for before the next is arrived at.
CLP_DEVICE uint32_t grid_arrive() { return cooperative_groups::this_grid().barrier_arrive(); }
CLP_DEVICE void grid_wait(uint32_t token) { cooperative_groups::this_grid().barrier_wait(static_cast<uint32_t&&>(token)); }

// 16 bytes to shared memory, of which `bytes` come from global memory (16-byte aligned) and the rest are zero.
CLP_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes)
               : "memory");
}
CLP_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
CLP_DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

CLP_DEVICE void store_shared(void* shared, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(shared) = make_uint4(words[0], words[1], words[2], words[3]);
}

// 8 x 8 matrices of 16 bits: lane l gives the address of row l % 8 of matrix l / 8 and gets elements 2 (l % 4), + 1 of row l
// / 4.
CLP_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}
CLP_DEVICE void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8), fragments as PTX has them for mma.m16n8k16.
template <class T>
CLP_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
CLP_DEVICE void mma<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
CLP_DEVICE void mma<F16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

CLP_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Memory that no block writes during the launch.
CLP_DEVICE uint16_t load_constant(const uint16_t* at) { return __ldg(at); }
CLP_DEVICE uint32_t load_constant(const uint32_t* at) { return __ldg(at); }
CLP_DEVICE float load_constant(const float* at) { return __ldg(at); }
// Memory that other blocks write and read during the launch: past L1, which is not coherent between SMs.
CLP_DEVICE float load_l2(const float* at) { return __ldcg(at); }
CLP_DEVICE uint32_t load_l2(const uint32_t* at) { return __ldcg(at); }
CLP_DEVICE void load_l2(float (&to)[4], const float* at) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(at));
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
CLP_DEVICE void store_l2(float* at, float value) { __stcg(at, value); }
CLP_DEVICE void store_l2(uint16_t* at, uint16_t value) { __stcg(at, value); }
CLP_DEVICE void store_l2(float* at, const float (&value)[4]) {
  __stcg(reinterpret_cast<float4*>(at), make_float4(value[0], value[1], value[2], value[3]));
}
CLP_DEVICE void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

}  // namespace clp::cuda
#endif
