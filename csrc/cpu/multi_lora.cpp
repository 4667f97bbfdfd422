#include "multi_lora.hpp"

#include <cstdlib>

#include "kernels.hpp"
#include "vecmath.hpp"

namespace clp::CLP_ISA {
namespace {

CLP_INLINE int64_t group_of(const GateRows& g, int64_t row) { return g.index ? g.index[row] : row / g.span; }

// Work for one thread is called outside any parallel region: entering one, even for a single thread, costs more than a
// decode-size call, and a team of another size may have libgomp rebuild the pool it shares with torch.

template <class T, class G>
void apply_gate_rows(const GateRows& g, int64_t first, int64_t last, const T* h, T* out) {
  const G* gate = static_cast<const G*>(g.gate);
  for (int64_t row = first; row < last; ++row) {
    const G* gate_row = gate + group_of(g, row) * g.rank;
    const T* from = h + row * g.rank;
    T* to = out + row * g.rank;
#pragma omp simd
    for (int64_t r = 0; r < g.rank; ++r) store(to + r, load(from + r) * load(gate_row + r));
  }
}

template <class T, class G>
void apply_gate(const GateRows& g, const T* h, T* out, int threads) {
  if (threads == 1) return apply_gate_rows<T, G>(g, 0, g.rows, h, out);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t)
    apply_gate_rows<T, G>(g, g.rows * t / threads, g.rows * (t + 1) / threads, h, out);
}

// One row's three results; sum (float64, of this row's group) may be null like the others.
template <class T, class G>
CLP_INLINE void backward_row(int64_t rank, const G* gate, const T* h, const T* ds, T* gated, T* scaled, double* sum) {
  if (sum) {
#pragma omp simd
    for (int64_t r = 0; r < rank; ++r) sum[r] += load(ds + r) * load(h + r);
  }
  if (gated) {
#pragma omp simd
    for (int64_t r = 0; r < rank; ++r) store(gated + r, load(h + r) * load(gate + r));
  }
  if (scaled) {
#pragma omp simd
    for (int64_t r = 0; r < rank; ++r) store(scaled + r, load(ds + r) * load(gate + r));
  }
}

// Sums over thousands of rows are kept in float64: one float32 accumulator loses three times what torch's pairwise sum does.
// Threads own whole gate rows where rows come in spans of one group and there are enough of them. Otherwise each thread sums
// into a copy of all groups, added in thread order; one thread alone where the copies would outgrow the rows.
template <class T, class G>
bool gate_backward(const GateRows& g, const T* h, const T* ds, T* gated, T* scaled, float* d_gate, int threads) {
  const G* gate = static_cast<const G*>(g.gate);
  const bool own_groups = !g.index && g.groups >= threads;
  if (d_gate && !own_groups && g.groups * threads > g.rows) threads = 1;
  const int64_t length = own_groups ? g.rank : g.groups * g.rank;
  double* sums = nullptr;
  if (d_gate && !(sums = static_cast<double*>(std::calloc(threads * length, sizeof(double))))) return false;
  const int64_t unit = own_groups ? g.span : 1, units = g.rows / unit;
  const auto share = [=, &g](int t) {
    double* own = sums ? sums + t * length : nullptr;
    for (int64_t u = units * t / threads; u < units * (t + 1) / threads; ++u) {
      for (int64_t row = u * unit; row < (u + 1) * unit; ++row) {
        const int64_t group = group_of(g, row), at = row * g.rank;
        backward_row(g.rank, gate + group * g.rank, h + at, ds + at, gated ? gated + at : nullptr,
                     scaled ? scaled + at : nullptr, own ? own + (own_groups ? 0 : group * g.rank) : nullptr);
      }
      if (own && own_groups) {
        for (int64_t r = 0; r < g.rank; ++r) {
          d_gate[u * g.rank + r] = static_cast<float>(own[r]);
          own[r] = 0;
        }
      }
    }
  };
  if (threads == 1) {
    share(0);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) share(t);
  }
  if (sums && !own_groups) {
    for (int64_t i = 0; i < length; ++i) {
      double sum = 0;
      for (int t = 0; t < threads; ++t) sum += sums[t * length + i];
      d_gate[i] = static_cast<float>(sum);
    }
  }
  std::free(sums);
  return true;
}

void apply_gate_any(const GateRows& g, DType dtype, const void* h, void* out, int threads) {
  if (dtype == DType::f32) return apply_gate<float, float>(g, (const float*)h, (float*)out, threads);
  if (g.dtype == DType::f32) return apply_gate<uint16_t, float>(g, (const uint16_t*)h, (uint16_t*)out, threads);
  apply_gate<uint16_t, uint16_t>(g, (const uint16_t*)h, (uint16_t*)out, threads);
}

template <class T, class G>
bool gate_backward_as(const GateRows& g, const void* h, const void* ds, void* gated, void* scaled, float* d_gate, int threads) {
  return gate_backward<T, G>(g, (const T*)h, (const T*)ds, (T*)gated, (T*)scaled, d_gate, threads);
}

bool gate_backward_any(const GateRows& g, DType dtype, const void* h, const void* ds, void* gated, void* scaled,
                       float* d_gate, int threads) {
  if (dtype == DType::f32) return gate_backward_as<float, float>(g, h, ds, gated, scaled, d_gate, threads);
  if (g.dtype == DType::f32) return gate_backward_as<uint16_t, float>(g, h, ds, gated, scaled, d_gate, threads);
  return gate_backward_as<uint16_t, uint16_t>(g, h, ds, gated, scaled, d_gate, threads);
}

}  // namespace

const MultiLoraKernels multi_lora_kernels = {apply_gate_any, gate_backward_any};

}  // namespace clp::CLP_ISA
