// C = A B^T [+ A' B'^T] [+ bias] or C += the same, in float32, from float32 or bfloat16 operands: the products of the CPU back-end
// where they are wider, faster or more reproducible than what BLAS gives.
//
//   a (m, k), b (n, k), c (m, n), bias (n);  a' and b' are more of the contraction: a low-rank term costs no pass over C of its own.
//   Element (i, p) of an operand is at data[i * row_stride + p * depth_stride]; one of the two strides is 1.
//
// An element of C is summed in an order that depends on k alone, never on m, n, its place or the number of threads: the same row
// gives the same bits whatever else is in the call.
//
// With AMX tiles (16 x 16 x 32 bfloat16 products with float32 accumulators) a float32 operand is taken as a sum of bfloat16 parts,
// x = x0 + x1 + x2, which for three parts is exact, and the partial products that count are added up:
//   3 parts   a0b0 + a0b1 + a1b0 + a0b2 + a1b1 + a2b0   what is left out is below 2^-24 of |a||b|: float32 for all purposes
//   2 parts   a0b0 + a0b1 + a1b0                        2^-16 of |a||b|: torch.set_float32_matmul_precision("high")
//   1 part    a0b0                                      2^-8: "medium"; and exact products of bfloat16 operands
// Tiles do 2048 operations a cycle and AVX-512 64, so six of them cost less than one float32 product. Denormal parts count as zero;
// an infinite operand gives NaN.
//
// Elsewhere `parts` is ignored. With AVX-512 BF16 two bfloat16 operands are multiplied as they are, a pair of the contraction at a
// time, into float32 sums (denormals count as zero): 128 operations an instruction, where float32 has 64. All else is float32.
#pragma once
#include <cstdint>

#include "instruction_sets.hpp"

namespace clp {

enum class DType : int;

struct MatmulOperand {
  const void* data = nullptr;
  DType dtype{};
  int64_t row_stride = 0, depth_stride = 0;
};

struct MatmulTerm {
  MatmulOperand a, b;
  int64_t k = 0;
};

struct Matmul {
  MatmulTerm terms[2];  // the second of no depth where there is none
  int64_t m = 0, n = 0;
  const float* bias = nullptr;
  float* c = nullptr;  // (m, n), rows `c_stride` elements apart
  int64_t c_stride = 0;
  bool accumulate = false;
  int parts = 3;
  int threads = 1;
};

struct MatmulKernels {
  bool outruns_blas[2];            // products of float32, of bfloat16 (DType): whether this is the quicker way to float32 sums
  bool (*matmul)(const Matmul&);   // false: no memory for the packed operands
};

CLP_IN_EACH_ISA(extern const MatmulKernels matmul_kernels;)

}  // namespace clp
