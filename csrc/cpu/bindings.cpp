// clp_kernels._native: addresses come in as integers (tensor.data_ptr()), sizes as int64; the caller has checked both.
#include <pybind11/pybind11.h>

#include <new>
#include <string>

#include "kernels.hpp"

namespace py = pybind11;

namespace clp {
void bind_decoder(py::module_&);
void bind_token_stats(py::module_&);
void bind_interpolation(py::module_&);
void bind_prefix_attention(py::module_&);
#ifdef CLP_HAVE_CUDA
void bind_cuda(py::module_&);
#endif
}

namespace {

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

clp::GateRows gate_rows(uintptr_t gate, int dtype, uintptr_t index, int64_t groups, int64_t rows, int64_t rank) {
  if (const int64_t* group = at<int64_t>(index)) {
    for (int64_t row = 0; row < rows; ++row)
      if (group[row] < 0 || group[row] >= groups)
        throw py::index_error("gate_index[" + std::to_string(row) + "] is " + std::to_string(group[row]) +
                              "; expected 0 <= index < " + std::to_string(groups) + ", the number of gate rows");
  }
  return {at<void>(gate), clp::DType(dtype), at<int64_t>(index), groups ? rows / groups : 0, groups, rows, rank};
}

void apply_gate(uintptr_t h, uintptr_t out, int dtype, uintptr_t gate, int gate_dtype, uintptr_t index, int64_t groups,
                int64_t rows, int64_t rank, int threads) {
  clp::table().multi_lora.apply_gate(gate_rows(gate, gate_dtype, index, groups, rows, rank), clp::DType(dtype), at<void>(h),
                                     at<void>(out), threads);
}

void gate_backward(uintptr_t h, uintptr_t ds, uintptr_t gated, uintptr_t scaled, uintptr_t d_gate, int dtype, uintptr_t gate,
                   int gate_dtype, uintptr_t index, int64_t groups, int64_t rows, int64_t rank, int threads) {
  const bool ok = clp::table().multi_lora.gate_backward(
      gate_rows(gate, gate_dtype, index, groups, rows, rank), clp::DType(dtype), at<void>(h), at<void>(ds), at<void>(gated),
      at<void>(scaled), at<float>(d_gate), threads);
  if (!ok) throw std::bad_alloc();
}

clp::MatmulOperand operand(const py::tuple& x) {
  return {at<void>(x[0].cast<uintptr_t>()), clp::DType(x[1].cast<int>()), x[2].cast<int64_t>(), x[3].cast<int64_t>()};
}

// An operand is (address, dtype, row stride, depth stride).
void matmul(const py::tuple& a, const py::tuple& b, int64_t k, const py::object& more, int64_t m, int64_t n, uintptr_t bias, uintptr_t c,
            int64_t c_stride, bool accumulate, int parts, int threads) {
  clp::Matmul x;
  x.terms[0] = {operand(a), operand(b), k};
  if (!more.is_none()) {
    const py::tuple second = more;
    x.terms[1] = {operand(second[0]), operand(second[1]), second[2].cast<int64_t>()};
  }
  x.m = m, x.n = n, x.bias = at<float>(bias), x.c = at<float>(c), x.c_stride = c_stride;
  x.accumulate = accumulate, x.parts = parts, x.threads = threads;
  bool ok;
  {
    py::gil_scoped_release release;
    ok = clp::table().matmul.matmul(x);
  }
  if (!ok) throw std::bad_alloc();
}

template <class T>
clp::PerRow<T> per_row(uintptr_t rows, T all) { return {at<T>(rows), all}; }

int64_t sample(uintptr_t logits, int dtype, int64_t rows, int64_t vocab, int64_t stride, uintptr_t uniforms, uintptr_t seeds,
               uintptr_t temperature_rows, float temperature, uintptr_t top_k_rows, int64_t top_k, uintptr_t top_p_rows,
               float top_p, uintptr_t min_p_rows, float min_p, uintptr_t tokens, uintptr_t logprob, int threads) {
  return clp::table().sampling.sample(
      {at<void>(logits), clp::DType(dtype), rows, vocab, stride, at<double>(uniforms), at<int64_t>(seeds),
       per_row<float>(temperature_rows, temperature), per_row<int64_t>(top_k_rows, top_k), per_row<float>(top_p_rows, top_p),
       per_row<float>(min_p_rows, min_p), at<int64_t>(tokens), at<float>(logprob)},
      threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of clp_kernels. Internal: the checked interface is clp_kernels itself.";
  m.def("isa", [] { return clp::table().name; }, "name of the instruction set in use");
  m.def("select_isa", &clp::select_isa, py::arg("name"), "force one of instruction_sets()");
  m.def("instruction_sets", [] {
    py::list names;
    for (const char* isa : clp::kInstructionSets)
      if (clp::runs(isa)) names.append(isa);
    return names;
  }, "those that this build has and this processor runs, the preferred one last");
  m.def("outruns_blas", [](int dtype) { return clp::table().matmul.outruns_blas[dtype]; }, py::arg("dtype"),
        "whether matmul is quicker than a BLAS at products of this dtype that end in float32");
  m.def("matmul", &matmul);
  // The GIL is kept where the work is a few microseconds, as releasing it costs one.
  m.def("apply_gate", &apply_gate);
  m.def("gate_backward", &gate_backward);
  m.def("sample", &sample, py::call_guard<py::gil_scoped_release>());
  clp::bind_decoder(m);
  clp::bind_token_stats(m);
  clp::bind_interpolation(m);
  clp::bind_prefix_attention(m);
#ifdef CLP_HAVE_CUDA
  m.def("has_cuda", [] { return true; }, "whether the CUDA kernels are part of this build");
  clp::bind_cuda(m);
#else
  m.def("has_cuda", [] { return false; }, "whether the CUDA kernels are part of this build");
#endif
}
