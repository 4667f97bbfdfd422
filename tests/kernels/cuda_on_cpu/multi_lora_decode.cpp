// The decode kernel on a CPU: as a library for the tests (ctypes), and as a program that checks itself, for the sanitizers.
#include "multi_lora_decode.cuh"

using namespace clp::cuda;

namespace {

template <class T>
void launch(const MultiLoraDecode& call, int sms, unsigned order) {
  with_kernel(call, [&](auto columns, auto aligned) {
    constexpr int kColumns = decltype(columns)::value;
    constexpr bool kAligned = decltype(aligned)::value;
    constexpr int kShared = MultiLoraDecodeKernel<T, kColumns, kAligned>::kSharedBytes;
    emulated::run(Plan(call.n, call.k, call.rank, sms).grid, kThreads, kShared, order,
                  [&] { multi_lora_decode_kernel<T, kColumns, kAligned>(call, sms); });
  });
}

}  // namespace

extern "C" {

int64_t workspace(int rows, int n, int k, int rank, int sms) { return workspace_bytes(rows, n, k, rank, sms); }

int grid(int n, int k, int rank, int sms) { return Plan(n, k, rank, sms).grid; }

int shared_bytes(int columns) {
  switch (columns) {
    case 1: return MultiLoraDecodeKernel<Bf16, 1, true>::kSharedBytes;
    case 2: return MultiLoraDecodeKernel<Bf16, 2, true>::kSharedBytes;
    case 4: return MultiLoraDecodeKernel<Bf16, 4, true>::kSharedBytes;
    case 8: return MultiLoraDecodeKernel<Bf16, 8, true>::kSharedBytes;
    case 16: return MultiLoraDecodeKernel<Bf16, 16, true>::kSharedBytes;
    default: return MultiLoraDecodeKernel<Bf16, 32, true>::kSharedBytes;
  }
}

uint16_t narrowed(int dtype, float value) { return dtype ? narrow<F16>(value) : narrow<Bf16>(value); }

void decode(const MultiLoraDecode* call, int dtype, int sms, unsigned order) {
// The sanitizers take long to compile, and the other format is the same code.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  if (Half(dtype) == Half::f16) return launch<F16>(*call, sms, order);
#endif
  if (Half(dtype) == Half::bf16) launch<Bf16>(*call, sms, order);
}

}  // extern "C"

// program [rows n k rank groups sms aligned] ...: one call each, buffers of exactly the size, against sums in float64.
int main(int count, char** values) {
  std::minstd_rand random(7);
  const auto fill = [&](std::vector<uint16_t>& to) {
    for (uint16_t& v : to) v = narrow<Bf16>(float(random() % 2001) / 1000 - 1);
  };
  for (int i = 1; i + 6 < count; i += 7) {
    int v[7];
    for (int j = 0; j < 7; ++j) v[j] = std::atoi(values[i + j]);
    const int rows = v[0], n = v[1], k = v[2], rank = v[3], groups = v[4], sms = v[5];
    const int64_t stride = v[6] ? (k + 7) / 8 * 8 : k;
    std::vector<uint16_t> x(rows * stride), w(n * stride), a(rank * stride), b(n * rank), bias(n), y(rows * n, 0xffff);
    std::vector<float> gate(groups * rank);
    std::vector<int32_t> index(rows);
    for (auto* t : {&x, &w, &a, &b, &bias}) fill(*t);
    for (float& g : gate) g = float(random() % 2001) / 1000 - 1;
    for (int32_t& at : index) at = int(random() % groups);
    const int64_t bytes = workspace_bytes(rows, n, k, rank, sms);
    std::unique_ptr<float[]> space(new float[bytes / 4 + 4]);
    std::memset(space.get(), 0xff, bytes + 16);
    const MultiLoraDecode call{x.data(), w.data(), a.data(), b.data(), bias.data(), gate.data(), index.data(), y.data(),
                               space.get(), stride, stride, stride, rank, rows, n, k, rank, groups, true, false};
    decode(&call, 0, sms, unsigned(i));
    double worst = 0;
    std::vector<double> s(rank);
    for (int m = 0; m < rows; ++m) {
      for (int r = 0; r < rank; ++r) {
        double h = 0;
        for (int c = 0; c < k; ++c) h += double(widen<Bf16>(x[m * stride + c])) * widen<Bf16>(a[r * stride + c]);
        s[r] = widen<Bf16>(narrow<Bf16>(float(h * gate[index[m] * rank + r])));
      }
      for (int c = 0; c < n; ++c) {
        double exact = widen<Bf16>(bias[c]);
        for (int d = 0; d < k; ++d) exact += double(widen<Bf16>(x[m * stride + d])) * widen<Bf16>(w[c * stride + d]);
        for (int r = 0; r < rank; ++r) exact += s[r] * widen<Bf16>(b[c * rank + r]);
        const double error = std::fabs(widen<Bf16>(y[m * n + c]) - exact) / (1 + std::fabs(exact));
        worst = error <= worst ? worst : error;  // NaN too
        if (!(error < 0.02)) return std::printf("y[%d, %d] is %g, expected %g\n", m, c, widen<Bf16>(y[m * n + c]), exact), 1;
      }
    }
    std::printf("%d x %d x %d rank %d on %d: worst %.2g\n", rows, n, k, rank, sms, worst);
  }
}
