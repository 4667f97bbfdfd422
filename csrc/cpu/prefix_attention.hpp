// Causal attention over N packed tokens in S sequences, of which several may continue one; the contract is clp_kernels/prefix_attention.py.
//
// Forward:  z = scale q.k, softcap tanh(z / softcap) if there is one; out = softmax(z) v; lse = log of the sum of e^z.
// Backward: p = e^(z - lse) made again, delta = sum over D of d_out * out, in float32:
//   dv += p^T d_out        ds = p (d_out v^T - delta) [(1 - tanh^2)]        dq = scale ds k        dk += scale ds^T q
//
// A unit of work is a sequence without a parent with all that continue it, for one key head: its keys and values are packed once,
// and its dk and dv are summed by one thread, so that neither the number of threads nor the rest of the row changes a bit.
#pragma once
#include <cstdint>

#include "instruction_sets.hpp"

namespace clp {

enum class DType : int;

// (N, heads, D) in the call's dtype, D dense; strides in elements.
struct HeadRows {
  void* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;
};

struct PrefixAttention {
  HeadRows q, k, v, out;        // (N, heads, dim), (N, kv_heads, dim) twice, (N, heads, dim)
  HeadRows d_out, dq, dk, dv;   // backward alone; a gradient that nobody asked for has no data
  DType dtype{};
  float* lse = nullptr;         // (N, heads), dense
  int64_t heads = 0, kv_heads = 0, dim = 0;
  int64_t sequences = 0;
  const int64_t* starts = nullptr;   // (sequences + 1)
  const int64_t* parents = nullptr;  // (sequences): -1, or an earlier sequence that has no parent
  float scale = 1.0f, softcap = 0.0f;
  int64_t window = 0;           // 0: none
  int threads = 1;
};

constexpr int64_t kPrefixAttentionMaxDim = 256;

struct PrefixAttentionKernels {
  bool (*forward)(const PrefixAttention&);  // false: no memory for packed keys and values
  bool (*backward)(const PrefixAttention&);
};

CLP_IN_EACH_ISA(extern const PrefixAttentionKernels prefix_attention_kernels;)

}  // namespace clp
