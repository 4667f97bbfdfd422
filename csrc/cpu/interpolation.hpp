// Elementwise work over lists of tensors: weighted sums, sign-consensus merges, inner products, sparsification.
//
// A call has a table of int64, one row per tensor of the list ("item"), whose first column is its number of elements;
// addresses are of dense memory. Items are cut into blocks and the blocks shared out among the threads, so that one large
// tensor and a hundred small ones keep them equally busy. Arithmetic in float32 unless said; no result depends on the number
// of threads.
#pragma once
#include <cstdint>

#include "instruction_sets.hpp"

namespace clp {

enum class DType : int;

// With v_i = weight_i * stack_i: sum is sum v_i; consensus the sum of the v_i that have the sign of sum v_i, and
// consensus_mean that sum divided by the sum of their abs(weight_i).
enum class Merge : int { sum = 0, consensus = 1, consensus_mean = 2 };

struct BlendList {
  const int64_t* table;  // (items, 4 + models): elements, row of weights, base or 0, out, the addresses of the stack
  int64_t items, models, blends;
  const float* weights;  // (rows, blends, models)
  float base_scale;
  DType dtype, out_dtype;  // of the stack; of base and out
  Merge merge;
};

struct PairList {
  const int64_t* table;  // (items, 1 + left + right): elements, addresses
  int64_t items, left, right;
  DType left_dtype, right_dtype;
  double* partial;  // (blocks, left, right) of pair_blocks()
  double* out;      // (items, left, right)
};

struct SparseList {
  const int64_t* table;  // (items, 4): elements, from, out, and the state of the hash or the bits of a float32 threshold
  int64_t items;
  DType dtype;
  bool random;
  uint64_t kept;  // random: element j stays where the hash of j, 53 bits, is less
  float scale;
};

constexpr int magnitude_buckets = 2048;

struct InterpolationKernels {
  // out[blend] = base_scale * base + merge of the stack, blends dense one after another. With one blend, out may be base or
  // one of the stack.
  void (*blend)(const BlendList&, int threads);
  // out[left][right] = sum of left * right, in float64.
  void (*inner_products)(const PairList&, int threads);
  int64_t (*pair_blocks)(const int64_t* table, int64_t items, int64_t width);
  // The kept-th largest abs(x) of n, 1 <= kept <= n, n under 2^32 for each thread. counts: threads * magnitude_buckets.
  float (*threshold)(const void* x, DType dtype, int64_t n, int64_t kept, uint32_t* counts, int threads);
  // out = scale * from, or 0 where it is dropped: by the hash of its place, or where abs(from) < threshold. out may be from.
  void (*sparsify)(const SparseList&, int threads);
};

CLP_IN_EACH_ISA(extern const InterpolationKernels interpolation_kernels;)

}  // namespace clp
