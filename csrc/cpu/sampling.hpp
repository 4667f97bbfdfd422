// One token per row by inverse CDF in index order; the contract is clp_kernels/sampling.py.
#pragma once
#include <cstdint>

#include "instruction_sets.hpp"

namespace clp {

enum class DType : int;

// A value for every row, or one for all where `rows` is null.
template <class T>
struct PerRow {
  const T* rows;
  T all;
  T operator[](int64_t row) const { return rows ? rows[row] : all; }
};

struct SampleCall {
  const void* logits;  // (rows, vocab), `stride` elements between rows
  DType dtype;
  int64_t rows, vocab, stride;
  const double* uniforms;  // (rows,) in [0, 1), or null: taken from seeds
  const int64_t* seeds;    // (rows,)
  PerRow<float> temperature;  // 0 takes the largest logit
  PerRow<int64_t> top_k;      // 0, or vocab and more, keeps all
  PerRow<float> top_p;        // 1 keeps all
  PerRow<float> min_p;        // 0 keeps all
  int64_t* tokens;
  float* logprob;
};

struct SamplingKernels {
  // On at most `threads` threads. Returns -1, or the first row without a finite largest logit (its token is -1, its log-prob NaN).
  int64_t (*sample)(const SampleCall& call, int threads);
};

CLP_IN_EACH_ISA(extern const SamplingKernels sampling_kernels;)

}  // namespace clp
