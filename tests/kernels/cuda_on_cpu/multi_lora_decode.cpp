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
    emulated::run(Plan(call, sms).grid, kThreads, kShared, order,
                  [&] { multi_lora_decode_kernel<T, kColumns, kAligned>(call, sms); });
  });
}

}  // namespace

extern "C" {

int64_t workspace(int rows, const int64_t* n, int layers, int k, int rank, int sms) {
  return workspace_bytes(rows, n, layers, k, rank, sms);
}

int grid(int n, int k, int rank, int sms) { return Plan(divide_up(n, kTile), 1, k, rank, sms).grid; }

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

// program [rows n k rank groups sms aligned layers] ...: one call each, buffers of exactly the size, against sums in float64.
// The first layer has n columns, each further one a few more than half of those before.
int main(int count, char** values) {
  std::minstd_rand random(7);
  const auto fill = [&](std::vector<uint16_t>& to) {
    for (uint16_t& v : to) v = narrow<Bf16>(float(random() % 2001) / 1000 - 1);
  };
  struct Made {
    std::vector<uint16_t> w, a, b, bias, y;
  };
  for (int i = 1; i + 7 < count; i += 8) {
    int v[8];
    for (int j = 0; j < 8; ++j) v[j] = std::atoi(values[i + j]);
    const int rows = v[0], k = v[2], rank = v[3], groups = v[4], sms = v[5], layers = v[7];
    const int64_t stride = v[6] ? (k + 7) / 8 * 8 : k;
    std::vector<uint16_t> x(rows * stride);
    fill(x);
    std::vector<float> gate(groups * rank);
    std::vector<int32_t> index(rows);
    for (float& g : gate) g = float(random() % 2001) / 1000 - 1;
    for (int32_t& at : index) at = int(random() % groups);
    std::vector<Made> made(layers);
    std::vector<int64_t> columns;
    MultiLoraDecode call{x.data(), gate.data(), index.data(), nullptr, stride, rows, k, rank, groups, layers, true, false, {}};
    for (int l = 0, n = v[1]; l < layers; ++l, n = n / 2 + 3) {
      Made& m = made[l];
      m.w.resize(n * stride), m.a.resize(rank * stride), m.b.resize(n * rank), m.bias.resize(n), m.y.assign(rows * n, 0xffff);
      for (auto* t : {&m.w, &m.a, &m.b, &m.bias}) fill(*t);
      call.layer[l] = {m.w.data(), m.a.data(), m.b.data(), m.bias.data(), m.y.data(), stride, stride, rank, n};
      columns.push_back(n);
    }
    const int64_t bytes = workspace_bytes(rows, columns.data(), layers, k, rank, sms);
    std::unique_ptr<float[]> space(new float[bytes / 4 + 4]);
    std::memset(space.get(), 0xff, bytes + 16);
    call.workspace = space.get();
    decode(&call, 0, sms, unsigned(i));
    double worst = 0;
    std::vector<double> s(rank);
    for (int l = 0; l < layers; ++l) {
      const Made& t = made[l];
      const int n = int(columns[l]);
      for (int m = 0; m < rows; ++m) {
        for (int r = 0; r < rank; ++r) {
          double h = 0;
          for (int c = 0; c < k; ++c) h += double(widen<Bf16>(x[m * stride + c])) * widen<Bf16>(t.a[r * stride + c]);
          s[r] = widen<Bf16>(narrow<Bf16>(float(h * gate[index[m] * rank + r])));
        }
        for (int c = 0; c < n; ++c) {
          double exact = widen<Bf16>(t.bias[c]);
          for (int d = 0; d < k; ++d) exact += double(widen<Bf16>(x[m * stride + d])) * widen<Bf16>(t.w[c * stride + d]);
          for (int r = 0; r < rank; ++r) exact += s[r] * widen<Bf16>(t.b[c * rank + r]);
          const double got = widen<Bf16>(t.y[m * n + c]), error = std::fabs(got - exact) / (1 + std::fabs(exact));
          worst = error <= worst ? worst : error;  // NaN too
          if (!(error < 0.02)) return std::printf("y[%d, %d] of layer %d is %g, expected %g\n", m, c, l, got, exact), 1;
        }
      }
    }
    std::printf("%d x %d x %d rank %d on %d: worst %.2g\n", rows, v[1], k, rank, sms, worst);
  }
}
