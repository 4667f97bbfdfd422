// The row-wise diagonal between the two skinny products of multi_lora_linear. The products themselves are torch's BLAS.
//
// Row i of h takes gate row index[i] or, where index is null, i / span. h and what is computed from it are (rows, rank),
// dense; gate is (groups, rank), dense, in h's dtype or float32. Arithmetic in float32.
#pragma once
#include <cstdint>

#include "instruction_sets.hpp"

namespace clp {

enum class DType : int;

struct GateRows {
  const void* gate;
  DType dtype;
  const int64_t* index;
  int64_t span, groups, rows, rank;
};

struct MultiLoraKernels {
  // out = h * gate. out may be h.
  void (*apply_gate)(const GateRows& g, DType dtype, const void* h, void* out, int threads);
  // One pass over (rows, rank): gated = h * gate, scaled = ds * gate, d_gate[group] = sum over its rows of ds * h (float32,
  // overwritten). Each of the three may be null; gated may be h and scaled may be ds. The sum over rows is in a fixed order
  // for a given number of threads. False where there was no memory for the sums.
  bool (*gate_backward)(const GateRows& g, DType dtype, const void* h, const void* ds, void* gated, void* scaled,
                        float* d_gate, int threads);
};

CLP_IN_EACH_ISA(extern const MultiLoraKernels multi_lora_kernels;)

}  // namespace clp
