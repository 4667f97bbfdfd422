#include "interpolation.hpp"

#include "kernels.hpp"
#include "vecmath.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstring>

namespace clp::CLP_ISA {
namespace {

constexpr int64_t blend_block = 1024;  // the running sums of a block, and its stack, stay in the first-level cache
constexpr int64_t pair_block = 32768;
// Results of at least this many bytes, past the caches, are written around them: an ordinary store first reads the line it
// writes to. A float32 copy of 64 MB took 0.7 times as long, one of 0.8 MB, which fits, 1.6 times (one core, AVX-512).
constexpr int64_t stream_bytes = 16 << 20;

CLP_INLINE int64_t block_count(const int64_t* table, int64_t items, int64_t width, int64_t length) {
  int64_t count = 0;
  for (int64_t p = 0; p < items; ++p) count += (table[p * width] + length - 1) / length;
  return count;
}

// body(item's row, first element, elements, block's number) for the blocks [first, last) of all items, in order.
template <class Body>
CLP_INLINE void each_block(const int64_t* table, int64_t items, int64_t width, int64_t length, int64_t first, int64_t last,
                           Body body) {
  int64_t before = 0;
  for (int64_t p = 0; p < items && before < last; ++p) {
    const int64_t* item = table + p * width;
    const int64_t blocks = (item[0] + length - 1) / length;
    const int64_t from = first > before ? first - before : 0, to = last - before < blocks ? last - before : blocks;
    for (int64_t b = from; b < to; ++b) {
      const int64_t at = b * length, left = item[0] - at;
      body(item, at, left < length ? left : length, before + b);
    }
    before += blocks;
  }
}

// Streamed stores are not ordered with what other threads do next; each thread that made some waits for them.
CLP_INLINE void drain() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Work for one thread is called outside any parallel region, as in multi_lora.cpp.
template <class Body>
CLP_INLINE void share_blocks(const int64_t* table, int64_t items, int64_t width, int64_t length, int threads, Body body) {
  const int64_t blocks = block_count(table, items, width, length);
  if (threads == 1) {
    each_block(table, items, width, length, 0, blocks, body);
    return drain();
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    each_block(table, items, width, length, blocks * t / threads, blocks * (t + 1) / threads, body);
    drain();
  }
}

// out = x, in out's type, around the caches if `stream`, which wants whole blocks.
template <class O>
CLP_INLINE void write(O* out, const float* x, int64_t n, bool stream) {
#if defined(__AVX2__)
  if (stream && n == blend_block && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    alignas(64) O line[blend_block];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(line + i, x[i]);
    const char* from = reinterpret_cast<const char*>(line);
    char* to = reinterpret_cast<char*>(out);
    for (size_t i = 0; i < sizeof line; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
    return;
  }
#endif
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out + i, x[i]);
}

CLP_INLINE int64_t element_count(const int64_t* table, int64_t items, int64_t width) {
  int64_t count = 0;
  for (int64_t p = 0; p < items; ++p) count += table[p * width];
  return count;
}

template <class T>
CLP_INLINE const T* source(int64_t address, int64_t at) { return reinterpret_cast<const T*>(address) + at; }

// sum += the weighted sum of COUNT of the stack: as few passes over `sum` as there are quadruples.
template <int COUNT, class T>
CLP_INLINE void add_some(float* sum, const int64_t* stack, const float* w, int64_t at, int64_t n) {
  const T* s0 = source<T>(stack[0], at);
  const T* s1 = source<T>(stack[COUNT > 1 ? 1 : 0], at);
  const T* s2 = source<T>(stack[COUNT > 2 ? 2 : 0], at);
  const T* s3 = source<T>(stack[COUNT > 3 ? 3 : 0], at);
  const float w0 = w[0], w1 = w[COUNT > 1 ? 1 : 0], w2 = w[COUNT > 2 ? 2 : 0], w3 = w[COUNT > 3 ? 3 : 0];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float x = sum[i] + w0 * load(s0 + i);
    if (COUNT > 1) x += w1 * load(s1 + i);
    if (COUNT > 2) x += w2 * load(s2 + i);
    if (COUNT > 3) x += w3 * load(s3 + i);
    sum[i] = x;
  }
}

template <class T>
void add_all(float* sum, const int64_t* stack, int64_t models, const float* w, int64_t at, int64_t n) {
  int64_t m = 0;
  for (; m + 4 <= models; m += 4) add_some<4, T>(sum, stack + m, w + m, at, n);
  if (models - m == 3) add_some<3, T>(sum, stack + m, w + m, at, n);
  if (models - m == 2) add_some<2, T>(sum, stack + m, w + m, at, n);
  if (models - m == 1) add_some<1, T>(sum, stack + m, w + m, at, n);
}

// A NaN is in neither side's sums but in the whole sum, which is then neither above nor below zero.
template <class T>
void add_consensus(float* sum, const int64_t* stack, int64_t models, const float* w, int64_t at, int64_t n, bool mean) {
  float whole[blend_block], above[blend_block], below[blend_block], weight_above[blend_block], weight_below[blend_block];
  for (int64_t i = 0; i < n; ++i) whole[i] = above[i] = below[i] = weight_above[i] = weight_below[i] = 0.0f;
  for (int64_t m = 0; m < models; ++m) {
    const T* s = source<T>(stack[m], at);
    const float weight = w[m], size = weight < 0.0f ? -weight : weight;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float v = weight * load(s + i);
      whole[i] += v;
      above[i] += v > 0.0f ? v : 0.0f;
      below[i] += v < 0.0f ? v : 0.0f;
      weight_above[i] += v > 0.0f ? size : 0.0f;
      weight_below[i] += v < 0.0f ? size : 0.0f;
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const bool up = whole[i] > 0.0f, down = whole[i] < 0.0f;
    const float chosen = up ? above[i] : below[i], weight = up ? weight_above[i] : weight_below[i];
    sum[i] += up || down ? (mean ? chosen / weight : chosen) : whole[i] * 0.0f;
  }
}

template <class T, class O>
void blend(const BlendList& list, int threads) {
  const int64_t width = 4 + list.models;
  const int64_t bytes = element_count(list.table, list.items, width) * list.blends * int64_t(sizeof(O));
  share_blocks(list.table, list.items, width, blend_block, threads,
               [&list, bytes](const int64_t* item, int64_t at, int64_t n, int64_t) {
    const O* base = reinterpret_cast<const O*>(item[2]);
    bool stream = bytes >= stream_bytes && item[3] != item[2];
    for (int64_t m = 0; m < list.models; ++m) stream = stream && item[3] != item[4 + m];
    float sum[blend_block];
    for (int64_t g = 0; g < list.blends; ++g) {
      const float* w = list.weights + (item[1] * list.blends + g) * list.models;
      if (base) {
        const float scale = list.base_scale;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) sum[i] = scale * load(base + at + i);
      } else {
        for (int64_t i = 0; i < n; ++i) sum[i] = 0.0f;
      }
      if (list.merge == Merge::sum)
        add_all<T>(sum, item + 4, list.models, w, at, n);
      else
        add_consensus<T>(sum, item + 4, list.models, w, at, n, list.merge == Merge::consensus_mean);
      write(reinterpret_cast<O*>(item[3]) + g * item[0] + at, sum, n, stream);
    }
  });
}

// float64 throughout costs nothing here: memory is slower than the conversions.
template <class L, class R>
CLP_INLINE double pair_sum(const L* a, const R* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(load(a + i)) * static_cast<double>(load(b + i));
  return sum;
}

template <class L, class R>
void inner_products(const PairList& list, int threads) {
  const int64_t pairs = list.left * list.right, width = 1 + list.left + list.right;
  share_blocks(list.table, list.items, width, pair_block, threads,
               [&list, pairs](const int64_t* item, int64_t at, int64_t n, int64_t block) {
    const int64_t *left = item + 1, *right = left + list.left;
    for (int64_t l = 0; l < list.left; ++l)
      for (int64_t r = 0; r < list.right; ++r)
        list.partial[block * pairs + l * list.right + r] = pair_sum(source<L>(left[l], at), source<R>(right[r], at), n);
  });
  const double* partial = list.partial;
  for (int64_t p = 0; p < list.items; ++p) {
    double* out = list.out + p * pairs;
    for (int64_t i = 0; i < pairs; ++i) out[i] = 0;
    for (int64_t b = 0; b < (list.table[p * width] + pair_block - 1) / pair_block; ++b, partial += pairs)
      for (int64_t i = 0; i < pairs; ++i) out[i] += partial[i];
  }
}

// The 53 upper bits of the j-th output of SplitMix64 started at `state`.
CLP_INLINE uint64_t hash_of(uint64_t state, uint64_t j) {
  uint64_t x = state + (j + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return (x ^ (x >> 31)) >> 11;
}

template <class T>
void sparsify(const SparseList& list, int threads) {
  const int64_t bytes = element_count(list.table, list.items, 4) * int64_t(sizeof(T));
  share_blocks(list.table, list.items, 4, blend_block, threads,
               [&list, bytes](const int64_t* item, int64_t at, int64_t n, int64_t) {
    const T* from = source<T>(item[1], at);
    float result[blend_block];
    const float scale = list.scale;
    if (list.random) {
      const uint64_t state = static_cast<uint64_t>(item[3]), kept = list.kept;
      uint32_t keep[blend_block];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) keep[i] = hash_of(state, static_cast<uint64_t>(at + i)) < kept ? 1u : 0u;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float x = scale * load(from + i);
        result[i] = keep[i] ? x : 0.0f;
      }
    } else {
      const float threshold = bits_float(static_cast<uint32_t>(item[3]));
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float x = load(from + i), size = x < 0.0f ? -x : x;
        result[i] = size < threshold ? 0.0f : scale * x;
      }
    }
    write(reinterpret_cast<T*>(item[2]) + at, result, n, bytes >= stream_bytes && item[1] != item[2]);
  });
}

// The kept-th largest abs(x) of one item by radix selection, as in sampling.cpp: the bits of abs(x) are in the order of its
// values, a NaN above all. Each thread counts its share of the elements into buckets of its own.
template <class T>
float threshold(const T* x, int64_t n, int64_t kept, uint32_t* counts, int threads) {
  constexpr int buckets = magnitude_buckets, widths[3] = {11, 10, 10};  // of 31 bits
  uint32_t prefix = 0;
  int shift = 31;
  for (int digit = 0; digit < 3; ++digit) {
    const int previous = shift;
    shift -= widths[digit];
    const auto count = [=](int t) {
      uint32_t* own = counts + static_cast<int64_t>(t) * buckets;
      std::memset(own, 0, sizeof(uint32_t) * buckets);
      const uint32_t mask = (1u << widths[digit]) - 1;
      for (int64_t i = n * t / threads; i < n * (t + 1) / threads; ++i) {
        const uint32_t key = float_bits(load(x + i)) & 0x7fffffffu;
        if ((key >> previous) == prefix) ++own[(key >> shift) & mask];
      }
    };
    if (threads == 1) {
      count(0);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int t = 0; t < threads; ++t) count(t);
    }
    int chosen = (1 << widths[digit]) - 1;
    for (;; --chosen) {
      int64_t here = 0;
      for (int t = 0; t < threads; ++t) here += counts[static_cast<int64_t>(t) * buckets + chosen];
      if (here >= kept || chosen == 0) break;
      kept -= here;
    }
    prefix = (prefix << widths[digit]) | static_cast<uint32_t>(chosen);
    if (sizeof(T) == 2 && shift <= 16) return bits_float(prefix << shift);  // bfloat16 has no more bits
  }
  return bits_float(prefix);
}

void blend_any(const BlendList& list, int threads) {
  const bool single = list.dtype == DType::f32, single_out = list.out_dtype == DType::f32;
  if (single) return single_out ? blend<float, float>(list, threads) : blend<float, uint16_t>(list, threads);
  single_out ? blend<uint16_t, float>(list, threads) : blend<uint16_t, uint16_t>(list, threads);
}

void inner_products_any(const PairList& list, int threads) {
  const bool left = list.left_dtype == DType::f32, right = list.right_dtype == DType::f32;
  if (left) return right ? inner_products<float, float>(list, threads) : inner_products<float, uint16_t>(list, threads);
  right ? inner_products<uint16_t, float>(list, threads) : inner_products<uint16_t, uint16_t>(list, threads);
}

int64_t pair_blocks(const int64_t* table, int64_t items, int64_t width) {
  return block_count(table, items, width, pair_block);
}

float threshold_any(const void* x, DType dtype, int64_t n, int64_t kept, uint32_t* counts, int threads) {
  if (dtype == DType::f32) return threshold(static_cast<const float*>(x), n, kept, counts, threads);
  return threshold(static_cast<const uint16_t*>(x), n, kept, counts, threads);
}

void sparsify_any(const SparseList& list, int threads) {
  list.dtype == DType::f32 ? sparsify<float>(list, threads) : sparsify<uint16_t>(list, threads);
}

}  // namespace

const InterpolationKernels interpolation_kernels = {blend_any, inner_products_any, pair_blocks, threshold_any,
                                                     sparsify_any};

}  // namespace clp::CLP_ISA
