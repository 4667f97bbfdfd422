// TokenStatsChunk as a Python object with write-only attributes, so that a loop over chunks sets only what changes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.hpp"

namespace py = pybind11;

namespace clp {

#define CLP_ADDRESS(field) \
  .def_property(#field, nullptr, [](TokenStatsChunk& c, uintptr_t address) { c.field = reinterpret_cast<decltype(c.field)>(address); })
#define CLP_VALUE(field) .def_readwrite(#field, &TokenStatsChunk::field)
// A (address of the first, ...) tuple in the order of TokenTerm; 0 for a term that is not asked for.
#define CLP_TERMS(field) \
  .def_property(#field, nullptr, [](TokenStatsChunk& c, const std::array<uintptr_t, kTokenTerms>& addresses) { \
    for (int t = 0; t < kTokenTerms; ++t) c.field[t] = reinterpret_cast<float*>(addresses[t]); })
#define CLP_DTYPE(field) \
  .def_property(#field, nullptr, [](TokenStatsChunk& c, int dtype) { c.field = static_cast<DType>(dtype); })

void bind_token_stats(py::module_& m) {
  py::class_<TokenStatsChunk>(m, "TokenStatsChunk", "one chunk of logits; see csrc/cpu/token_stats.hpp")
      .def(py::init<>())
      CLP_ADDRESS(policy) CLP_ADDRESS(reference) CLP_VALUE(policy_stride) CLP_VALUE(reference_stride) CLP_DTYPE(dtype)
      CLP_VALUE(rows) CLP_VALUE(cols) CLP_VALUE(first_column) CLP_ADDRESS(bias) CLP_ADDRESS(reference_bias)
      CLP_VALUE(logit_scale) CLP_VALUE(softcap) CLP_ADDRESS(inv_temperature) CLP_ADDRESS(targets) CLP_VALUE(ignore_index)
      CLP_VALUE(flags) CLP_VALUE(threads) CLP_ADDRESS(state) CLP_ADDRESS(top1) CLP_VALUE(state_stride)
      CLP_TERMS(terms) CLP_TERMS(term_sums) CLP_VALUE(term_sums_stride) CLP_VALUE(term_width) CLP_ADDRESS(centre)
      CLP_ADDRESS(saved) CLP_ADDRESS(coefs) CLP_VALUE(row_stride) CLP_ADDRESS(out) CLP_VALUE(out_stride) CLP_DTYPE(out_dtype);
  m.def("token_stats_forward", [](const TokenStatsChunk& c) { table().token_stats.forward(c); },
        py::call_guard<py::gil_scoped_release>());
  m.def("token_stats_backward", [](const TokenStatsChunk& c) { table().token_stats.backward(c); },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace clp
