// A tensor (N, heads, D) comes in as (address, token stride, head stride); an address of 0 is a gradient that nobody asked for.
#include <pybind11/pybind11.h>

#include <new>
#include <string>

#include "kernels.hpp"

namespace py = pybind11;

namespace clp {
namespace {

HeadRows head_rows(const py::tuple& x) {
  return {reinterpret_cast<void*>(x[0].cast<uintptr_t>()), x[1].cast<int64_t>(), x[2].cast<int64_t>()};
}

// The kernels follow these numbers to addresses.
void check_layout(const PrefixAttention& x, int64_t tokens) {
  auto fail = [](const std::string& what) { throw py::value_error("prefix_attention: " + what + "; PrefixLayout makes what fits"); };
  if (x.starts[0] != 0 || x.starts[x.sequences] != tokens)
    fail("starts goes from " + std::to_string(x.starts[0]) + " to " + std::to_string(x.starts[x.sequences]) + ", expected 0 to " +
         std::to_string(tokens));
  for (int64_t s = 0; s < x.sequences; ++s) {
    const int64_t parent = x.parents[s];
    if (x.starts[s + 1] < x.starts[s]) fail("starts decreases after sequence " + std::to_string(s));
    if (parent < -1 || parent >= s || (parent >= 0 && x.parents[parent] >= 0))
      fail("the parent of sequence " + std::to_string(s) + " is " + std::to_string(parent) +
           ", expected -1 or an earlier sequence without a parent");
  }
}

// sizes: tokens, heads, kv_heads, dim, sequences. tensors: q, k, v, out and, for backward, d_out, dq, dk, dv.
void attend(const py::tuple& tensors, uintptr_t lse, int dtype, const py::tuple& sizes, uintptr_t starts, uintptr_t parents, float scale,
            float softcap, int64_t window, int threads) {
  PrefixAttention x;
  x.q = head_rows(tensors[0]), x.k = head_rows(tensors[1]), x.v = head_rows(tensors[2]), x.out = head_rows(tensors[3]);
  const bool backward = tensors.size() > 4;
  if (backward)
    x.d_out = head_rows(tensors[4]), x.dq = head_rows(tensors[5]), x.dk = head_rows(tensors[6]), x.dv = head_rows(tensors[7]);
  x.dtype = DType(dtype), x.lse = reinterpret_cast<float*>(lse);
  x.heads = sizes[1].cast<int64_t>(), x.kv_heads = sizes[2].cast<int64_t>(), x.dim = sizes[3].cast<int64_t>();
  x.sequences = sizes[4].cast<int64_t>();
  x.starts = reinterpret_cast<int64_t*>(starts), x.parents = reinterpret_cast<int64_t*>(parents);
  x.scale = scale, x.softcap = softcap, x.window = window, x.threads = threads;
  check_layout(x, sizes[0].cast<int64_t>());
  bool ok;
  {
    py::gil_scoped_release release;
    ok = backward ? table().prefix_attention.backward(x) : table().prefix_attention.forward(x);
  }
  if (!ok) throw std::bad_alloc();
}

}  // namespace

void bind_prefix_attention(py::module_& m) {
  m.def("prefix_attention", &attend);
  m.attr("PREFIX_ATTENTION_MAX_DIM") = kPrefixAttentionMaxDim;
}

}  // namespace clp
