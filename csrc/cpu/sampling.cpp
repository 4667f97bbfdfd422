#include "sampling.hpp"

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.hpp"
#include "vecmath.hpp"

namespace clp::CLP_ISA {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int64_t block = 256;  // summed in float32 by lanes; blocks are summed in float64

// splitmix64: any two seeds, consecutive ones included, give independent-looking uniforms.
double uniform_from(int64_t seed) {
  uint64_t x = static_cast<uint64_t>(seed) + 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return static_cast<double>((x ^ (x >> 31)) >> 11) * 0x1p-53;
}

// Unsigned keys in the order of the floats.
CLP_INLINE uint32_t key_of(float x) {
  const uint32_t u = float_bits(x);
  return u ^ ((u >> 31) ? 0xffffffffu : 0x80000000u);
}
CLP_INLINE float value_of(uint32_t key) { return bits_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu)); }

struct Count {
  CLP_INLINE double operator()(float) const { return 1.0; }
};
struct Mass {
  float largest, inverse_temperature;
  CLP_INLINE double operator()(float x) const { return exp_approx((x - largest) * inverse_temperature); }
};

// The largest value t among the row's values >= floor such that the values >= t weigh at least `wanted` together: the k-th
// largest value for weight 1. Radix selection: three digits of the key, most significant first, no sort.
template <class T, class Weight>
float selection_threshold(const T* row, int64_t n, float floor, double wanted, Weight weight) {
  constexpr int widths[3] = {11, 11, 10};
  double heap[2048];
  uint32_t prefix = 0;
  int shift = 32;
  double above = 0;
  for (int width : widths) {
    const int buckets = 1 << width, previous = shift;
    shift -= width;
    std::memset(heap, 0, sizeof(double) * buckets);
    for (int64_t i = 0; i < n; ++i) {
      const float x = load(row + i);
      const uint32_t key = key_of(x);
      if ((previous == 32 || (key >> previous) == prefix) && x >= floor) heap[(key >> shift) & (buckets - 1)] += weight(x);
    }
    // Where rounding keeps the sum under what is wanted, this ends on the lowest bucket that has anything in it.
    int chosen = -1;
    for (int b = buckets - 1; b >= 0; --b) {
      if (heap[b] <= 0) continue;
      if (chosen >= 0) above += heap[chosen];
      chosen = b;
      if (above + heap[b] >= wanted) break;
    }
    if (chosen < 0) return floor;
    prefix = (prefix << width) | static_cast<uint32_t>(chosen);
  }
  return value_of(prefix);
}

template <class T>
float largest_of(const T* row, int64_t n) {
  float largest = -infinity;
  int32_t nan = 0;  // as wide as a float: a bool here keeps the loop from being vectorised
#pragma omp simd reduction(max : largest) reduction(| : nan)
  for (int64_t i = 0; i < n; ++i) {
    const float x = load(row + i);
    nan |= x != x ? 1 : 0;
    largest = x > largest ? x : largest;
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : largest;
}

// sum of exp((x - largest) / temperature) over x >= threshold.
template <class T>
float kept_mass(const T* row, int64_t n, float largest, float inverse_temperature, float threshold) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float x = load(row + i);
    const float e = exp_approx((x - largest) * inverse_temperature);
    sum += x >= threshold ? e : 0.0f;
  }
  return sum;
}

template <class T>
double total_mass(const T* row, int64_t n, float largest, float inverse_temperature, float threshold) {
  double total = 0;
  for (int64_t at = 0; at < n; at += block)
    total += kept_mass(row + at, n - at < block ? n - at : block, largest, inverse_temperature, threshold);
  return total;
}

// First index whose running sum exceeds `target`; the last index of any weight where rounding keeps the sum below it.
template <class T>
int64_t draw(const T* row, int64_t n, float largest, float inverse_temperature, float threshold, double target) {
  double below = 0;
  int64_t last = -1;
  for (int64_t at = 0; at < n; at += block) {
    const int64_t length = n - at < block ? n - at : block;
    const float mass = kept_mass(row + at, length, largest, inverse_temperature, threshold);
    if (mass <= 0) continue;
    last = at;
    if (below + mass > target) break;
    below += mass;
  }
  int64_t token = last;
  for (int64_t i = last, end = n - last < block ? n : last + block; i < end; ++i) {
    const float x = load(row + i);
    const float e = x >= threshold ? exp_approx((x - largest) * inverse_temperature) : 0.0f;
    if (e <= 0) continue;
    token = i;
    if ((below += e) > target) break;
  }
  return token;
}

template <class T>
bool sample_row(const SampleCall& c, int64_t r) {
  const T* row = static_cast<const T*>(c.logits) + r * c.stride;
  const float largest = largest_of(row, c.vocab);
  if (!(std::fabs(largest) < infinity)) {
    c.tokens[r] = -1;
    c.logprob[r] = std::numeric_limits<float>::quiet_NaN();
    return false;
  }
  const float temperature = c.temperature[r];
  float inverse = temperature > 0 ? 1.0f / temperature : 1.0f;
  if (inverse == infinity) inverse = std::numeric_limits<float>::max();  // 0 * infinity would be NaN
  const double whole = total_mass(row, c.vocab, largest, inverse, -infinity);
  int64_t token = 0;
  if (temperature > 0) {
    float threshold = -infinity;
    const int64_t k = c.top_k[r] > 0 ? c.top_k[r] : c.vocab;
    if (k < c.vocab) threshold = selection_threshold(row, c.vocab, threshold, static_cast<double>(k), Count{});
    double kept = k < c.vocab ? total_mass(row, c.vocab, largest, inverse, threshold) : whole;
    const float p = c.top_p[r];
    if (p < 1) threshold = selection_threshold(row, c.vocab, threshold, p * kept, Mass{largest, inverse});
    const float m = c.min_p[r];
    if (m > 0) {
      const float lowest = largest + temperature * std::log(m);
      threshold = lowest > threshold ? lowest : threshold;
    }
    if (p < 1 || m > 0) kept = total_mass(row, c.vocab, largest, inverse, threshold);
    const double u = c.uniforms ? c.uniforms[r] : uniform_from(c.seeds[r]);
    token = draw(row, c.vocab, largest, inverse, threshold, u * kept);
  } else {
    while (load(row + token) != largest) ++token;
  }
  c.tokens[r] = token;
  c.logprob[r] = static_cast<float>((load(row + token) - largest) * inverse - std::log(whole));
  return true;
}

// Rows [first, last); returns the first bad one, or call.rows.
int64_t sample_rows(const SampleCall& call, int64_t first, int64_t last) {
  int64_t bad = call.rows;
  for (int64_t r = first; r < last; ++r) {
    const bool ok = call.dtype == DType::f32 ? sample_row<float>(call, r) : sample_row<uint16_t>(call, r);
    if (!ok && r < bad) bad = r;
  }
  return bad;
}

constexpr int64_t kSerial = 1 << 14;  // logits that one thread draws from sooner than two would start

int64_t sample(const SampleCall& call, int threads) {
  int64_t bad = call.rows;
  if (call.rows < 2 || call.rows * call.vocab <= kSerial) threads = 1;
  if (threads == 1) {
    bad = sample_rows(call, 0, call.rows);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : bad)
    for (int t = 0; t < threads; ++t) {
      const int64_t here = sample_rows(call, call.rows * t / threads, call.rows * (t + 1) / threads);
      bad = here < bad ? here : bad;
    }
  }
  return bad < call.rows ? bad : -1;
}

}  // namespace

const SamplingKernels sampling_kernels = {sample};

}  // namespace clp::CLP_ISA
