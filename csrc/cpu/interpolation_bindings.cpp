#include <pybind11/pybind11.h>

#include "kernels.hpp"

namespace py = pybind11;

namespace clp {
namespace {

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

void blend(uintptr_t rows, int64_t items, int64_t models, int64_t blends, uintptr_t weights, float base_scale, int dtype,
           int out_dtype, int merge, int threads) {
  table().interpolation.blend({at<int64_t>(rows), items, models, blends, at<float>(weights), base_scale, DType(dtype),
                               DType(out_dtype), Merge(merge)},
                              threads);
}

void inner_products(uintptr_t rows, int64_t items, int64_t left, int64_t right, int left_dtype, int right_dtype,
                    uintptr_t partial, uintptr_t out, int threads) {
  table().interpolation.inner_products({at<int64_t>(rows), items, left, right, DType(left_dtype), DType(right_dtype),
                                        at<double>(partial), at<double>(out)},
                                       threads);
}

int64_t pair_blocks(uintptr_t rows, int64_t items, int64_t width) {
  return table().interpolation.pair_blocks(at<int64_t>(rows), items, width);
}

void thresholds(uintptr_t rows, int64_t items, int dtype, uintptr_t counts, uintptr_t out, int64_t serial, int threads) {
  const int64_t* row = at<int64_t>(rows);
  for (int64_t p = 0; p < items; ++p, row += 3)
    at<float>(out)[p] = table().interpolation.threshold(at<void>(row[1]), DType(dtype), row[0], row[2], at<uint32_t>(counts),
                                                        row[0] > serial ? threads : 1);
}

void sparsify(uintptr_t rows, int64_t items, int dtype, bool random, uint64_t kept, float scale, int threads) {
  table().interpolation.sparsify({at<int64_t>(rows), items, DType(dtype), random, kept, scale}, threads);
}

}  // namespace

void bind_interpolation(py::module_& m) {
  m.def("blend", &blend, py::call_guard<py::gil_scoped_release>());
  m.def("inner_products", &inner_products, py::call_guard<py::gil_scoped_release>());
  m.def("pair_blocks", &pair_blocks);
  m.def("thresholds", &thresholds, py::call_guard<py::gil_scoped_release>());
  m.def("sparsify", &sparsify, py::call_guard<py::gil_scoped_release>());
}

}  // namespace clp
