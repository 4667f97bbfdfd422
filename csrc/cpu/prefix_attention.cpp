// The rows of a block are the queries of consecutive tokens with all query heads of one key head, which share every key.
//
// Columns are the keys that a sequence sees: the parent's tokens, then its own. Keys (transposed) are packed in panels of kPanel,
// the parent's and the sequence's own each from a panel's start; values lie row by row, the parent's and then the own, so that a
// block's columns are one contraction. Scores of the own panels are written right behind the parent's, over the padding there.
//
// Forward takes up to kChunk columns at a time: one product with the keys, one softmax, one product with the values, and more than
// kChunk columns by rescaling what is there (online softmax). Backward needs no sums over columns but delta, so it takes a panel
// at a time, whose two score blocks stay in L1.
#include "prefix_attention.hpp"

#include <cstdlib>

#include "kernels.hpp"
#include "vecmath.hpp"

namespace clp::CLP_ISA {
namespace {

// Tiles of `tile_rows(w)` rows and w vectors: their accumulators fill the registers, or divide a panel.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr int kGroup = 4;
constexpr int tile_rows(int w) { return w == 4 ? 6 : w == 3 ? 8 : 12; }
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
constexpr int kGroup = 2;
constexpr int tile_rows(int) { return 6; }
#elif defined(__aarch64__)
constexpr int64_t kLanes = 4;
constexpr int kGroup = 4;
constexpr int tile_rows(int w) { return w == 4 ? 6 : 8; }
#else
constexpr int64_t kLanes = 4;
constexpr int kGroup = 2;
constexpr int tile_rows(int) { return 4; }
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

constexpr int64_t kPanel = 64, kChunk = 256, kForwardRows = 24, kBackwardRows = 48;
constexpr int64_t kChain = 128;  // additions in a row: their rounding errors grow with its root
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

CLP_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CLP_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
CLP_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }
CLP_INLINE float finite_or_zero(float m) { return m == kMinusInf ? 0.0f : m; }

// ---- vectors ---------------------------------------------------------------------------------------------------------------

typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Quad __attribute__((vector_size(16)));

// exp_approx of vecmath.hpp for x <= 0. Loops that keep sums in a Vector reduce it once at their end, and by halves: what a
// compiler makes of a reduction clause adds one lane after the other.
CLP_INLINE Vector exp_not_positive(Vector x) {
  const Vector t = x * 1.44269504088896341f + 12582912.0f, n = t - 12582912.0f;
  Vector r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vector y = (Vector)((Integers)p + ((Integers)t << 23));
  const Vector flushed = x < -87.3365478515625f ? Vector{} : y;
  return x == x ? flushed : x;
}

CLP_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

CLP_INLINE float sum_of(Vector x) {
  Quad q[kLanes / 4];
  std::memcpy(q, &x, sizeof q);
#pragma GCC unroll 4
  for (int64_t i = 1; i < kLanes / 4; ++i) q[0] += q[i];
  return (q[0][0] + q[0][1]) + (q[0][2] + q[0][3]);
}

CLP_INLINE float largest_of(Vector x) {
  Quad q[kLanes / 4];
  std::memcpy(q, &x, sizeof q);
#pragma GCC unroll 4
  for (int64_t i = 1; i < kLanes / 4; ++i) q[0] = q[i] > q[0] ? q[i] : q[0];
  const float a = q[0][0] > q[0][1] ? q[0][0] : q[0][1], b = q[0][2] > q[0][3] ? q[0][2] : q[0][3];
  return a > b ? a : b;
}

// ---- products: c (m, n) [+]= a (m, k) b (k, n) -------------------------------------------------------------------------------

// Where a's element (i, p) is. Strides are constants, so that a tile's rows are offsets in its instructions.
template <int64_t LD>
struct ByRow {
  static CLP_INLINE int64_t at(int64_t i, int64_t p) { return i * LD + p; }
};
template <int64_t LD>
struct ByColumn {
  static CLP_INLINE int64_t at(int64_t i, int64_t p) { return i + p * LD; }
};

template <class A, int M, int W>
void tile(const float* a, int64_t k, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  Vector sums[M][W] = {};
  for (int64_t p = 0; p < k; ++p, b += ldb) {
    Vector right[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) right[w] = *reinterpret_cast<const Vector*>(b + w * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const float left = a[A::at(i, p)];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sums[i][w] += left * right[w];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      Unaligned* to = reinterpret_cast<Unaligned*>(c + i * ldc + w * kLanes);
      *to = add ? *to + sums[i][w] : sums[i][w];
    }
}

template <class A, int M, int W>
CLP_INLINE void tiles(const float* a, int64_t m, int64_t k, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  for (; m >= M; m -= M, a += A::at(M, 0), c += M * ldc) tile<A, M, W>(a, k, b, ldb, c, ldc, add);
  if constexpr (M > 1) {
    constexpr int next = M == 12 ? 8 : M == 6 ? 4 : M / 2;
    if (m) tiles<A, next, W>(a, m, k, b, ldb, c, ldc, add);
  }
}

// b and its rows are aligned to a vector, and its width is `vectors` of them. m and k are at least 1.
template <class A>
void product(const float* a, int64_t m, int64_t k, const float* b, int64_t ldb, int64_t vectors, float* c, int64_t ldc, bool add) {
  for (int64_t from = 0; from < k; from += kChain, a += A::at(0, kChain), b += kChain * ldb, add = true) {
    const int64_t depth = smaller(k - from, kChain);
    for (int64_t j = 0, w; j < vectors; j += w) {
      const int64_t left = vectors - j;
      w = left <= kGroup ? left : left < 2 * kGroup ? (left + 1) / 2 : kGroup;
      const float* right = b + j * kLanes;
      float* to = c + j * kLanes;
      switch (w) {
        case 1: tiles<A, tile_rows(1), 1>(a, m, depth, right, ldb, to, ldc, add); break;
        case 2: tiles<A, tile_rows(2), 2>(a, m, depth, right, ldb, to, ldc, add); break;
        default:
          if constexpr (kGroup > 2) {
            if (w == 3) tiles<A, tile_rows(3), 3>(a, m, depth, right, ldb, to, ldc, add);
            else tiles<A, tile_rows(4), 4>(a, m, depth, right, ldb, to, ldc, add);
          }
      }
    }
  }
}

// The same for a (m, k) in rows `lda` apart, one of the three that a block of queries has.
CLP_INLINE int64_t row_stride(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : kPrefixAttentionMaxDim; }

void product_of_rows(const float* a, int64_t lda, int64_t m, int64_t k, const float* b, int64_t ldb, int64_t vectors, float* c, int64_t ldc) {
  switch (lda) {
    case 64: return product<ByRow<64>>(a, m, k, b, ldb, vectors, c, ldc, false);
    case 128: return product<ByRow<128>>(a, m, k, b, ldb, vectors, c, ldc, false);
    default: return product<ByRow<kPrefixAttentionMaxDim>>(a, m, k, b, ldb, vectors, c, ldc, false);
  }
}

// ---- what one thread works with ------------------------------------------------------------------------------------------------

// Largest sizes over all units: `panels` columns in whole panels, `columns` in all.
struct Sizes {
  int64_t dim, padded, stride;  // D, D in whole vectors, and between the rows of a block of queries
  int64_t panels, columns;

  CLP_INLINE int64_t forward() const {
    return panels * dim + columns * padded + kForwardRows * (stride + kChunk + padded);
  }
  CLP_INLINE int64_t backward() const {
    return 2 * panels * dim + 3 * columns * padded + kBackwardRows * (2 * stride + 2 * kPanel + padded);
  }
};

// Hands out floats of one allocation, each array aligned to a cache line.
struct Arena {
  float* next;

  CLP_INLINE float* take(int64_t count) {
    float* taken = next;
    next += round_up(count, 16);
    return taken;
  }
};
constexpr int64_t kArenaSlack = 16 * 16;

// What a sequence sees: `before` tokens of its parent from token `prefix` on, then its own `count` from `start` on.
struct Sequence {
  int64_t prefix, before, start, count;

  CLP_INLINE int64_t panels() const { return (before + kPanel - 1) / kPanel + (count + kPanel - 1) / kPanel; }
};

struct Panel {
  int64_t column, count, width;  // of its keys: the first, how many, and that in whole vectors
  int64_t offset;                // of its packed keys, in keys
};

CLP_INLINE Panel panel_of(const Sequence& s, int64_t index) {
  const int64_t parents = (s.before + kPanel - 1) / kPanel;
  const int64_t first = (index < parents ? index : index - parents) * kPanel;
  const int64_t count = smaller(kPanel, (index < parents ? s.before : s.count) - first);
  return {index < parents ? first : s.before + first, count, round_up(count, kLanes), index * kPanel};
}

// Rows [first, first + count) of a sequence and a key head: row r is token r / share, and query head r % share of the key head's.
struct Block {
  int64_t count, low, high;  // rows; the columns that any of them sees
  int64_t token[kBackwardRows], head[kBackwardRows], seen[kBackwardRows];  // of each row: it sees columns below `seen`

  CLP_INLINE Block(const Sequence& s, int64_t first, int64_t rows, int64_t share, int64_t kv_head, int64_t window) : count(rows) {
    int64_t t = first / share, h = first % share;
    for (int64_t i = 0; i < rows; ++i) {
      token[i] = s.start + t, head[i] = kv_head * share + h, seen[i] = s.before + t + 1;
      if (++h == share) h = 0, ++t;
    }
    low = larger(0, seen[0] - window), high = seen[rows - 1];
  }
};

CLP_INLINE int64_t first_panel(const Sequence& s, const Block& block) {
  int64_t p = 0;
  for (;; ++p) {
    const Panel panel = panel_of(s, p);
    if (panel.column + panel.count > block.low) return p;
  }
}

template <class T>
CLP_INLINE T* row_of(const HeadRows& x, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + token * x.token_stride + head * x.head_stride;
}

// Rows that the next block will read, or write, into the cache while this one is computed: what follows in the row of tokens.
template <class T>
CLP_INLINE void prefetch_next(const HeadRows& x, const Block& block, int64_t rows, int64_t share, int64_t tokens, int64_t dim) {
  const int64_t kv_head = block.head[0] / share, from = block.token[block.count - 1] + 1;
  const int64_t to = smaller(tokens, from + (rows + share - 1) / share);
  for (int64_t t = from; t < to; ++t)
    for (int64_t h = kv_head * share; h < (kv_head + 1) * share; ++h)
      for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(row_of<T>(x, t, h) + d);
}

// Rows that this block will write once it is done: whole lines, which are read first where they are not in the cache.
template <class T>
CLP_INLINE void prefetch_written(const HeadRows& x, const Block& block, int64_t dim) {
  for (int64_t i = 0; i < block.count; ++i)
    for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(row_of<T>(x, block.token[i], block.head[i]) + d, 1);
}

// Panels of one sequence's tokens, transposed: of each (dim, width), zeros behind the last key.
template <class T>
void pack_transposed(const HeadRows& x, int64_t head, int64_t start, int64_t count, int64_t dim, float* to) {
  for (int64_t first = 0; first < count; first += kPanel, to += kPanel * dim) {
    const int64_t used = smaller(kPanel, count - first), width = round_up(used, kLanes);
    for (int64_t j = 0; j < width; ++j) {
      if (j < used) {
        const T* from = row_of<T>(x, start + first + j, head);
        for (int64_t d = 0; d < dim; ++d) to[d * width + j] = load(from + d);
      } else {
        for (int64_t d = 0; d < dim; ++d) to[d * width + j] = 0.0f;
      }
    }
  }
}

template <class T>
CLP_INLINE void pack_row(const T* from, int64_t dim, int64_t padded, float scale, float* to) {
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) to[d] = scale * load(from + d);
  for (int64_t d = dim; d < padded; ++d) to[d] = 0.0f;
}

template <class T>
void pack_rows(const HeadRows& x, int64_t head, int64_t start, int64_t count, int64_t dim, int64_t padded, float* to) {
  for (int64_t t = 0; t < count; ++t) pack_row(row_of<T>(x, start + t, head), dim, padded, 1.0f, to + t * padded);
}

template <class T>
CLP_INLINE void unpack_row(const float* from, int64_t dim, float scale, T* to) {
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) store(to + d, scale * from[d]);
}

CLP_INLINE void fill(float* x, int64_t from, int64_t to, float value) {
  for (int64_t j = from; j < to; ++j) x[j] = value;
}

// ---- forward ---------------------------------------------------------------------------------------------------------------

struct ForwardScratch {
  float *keys, *values;                 // panels (dim, width); (columns, padded)
  float *queries, *scores, *sums;       // (rows, stride), (rows, kChunk), (rows, padded)
  float top[kForwardRows], mass[kForwardRows];

  CLP_INLINE ForwardScratch(Arena arena, const Sizes& z) {
    keys = arena.take(z.panels * z.dim);
    values = arena.take(z.columns * z.padded);
    queries = arena.take(kForwardRows * z.stride);
    scores = arena.take(kForwardRows * kChunk);
    sums = arena.take(kForwardRows * z.padded);
  }
};

// One row's scores z of columns, of which it sees [low, high), become e^(z - top) in whole vectors; `sums` are what it has so far.
void softmax_row(float* z, int64_t low, int64_t high, int64_t columns, float softcap, float& top, float& mass, float* sums, int64_t padded) {
  const int64_t width = round_up(columns, kLanes);
  if (low >= high) return fill(z, 0, width, 0.0f);
  if (softcap > 0.0f) {
    const float inverse = 1.0f / softcap;
#pragma omp simd
    for (int64_t j = low; j < high; ++j) z[j] = softcap * tanh_approx(z[j] * inverse);
  }
  fill(z, 0, low, kMinusInf);
  fill(z, high, width, kMinusInf);
  Vector* v = reinterpret_cast<Vector*>(z);
  const int64_t vectors = width / kLanes;
  Vector most = v[0];
  for (int64_t j = 1; j < vectors; ++j) most = larger(v[j], most);
  const float here = largest_of(most), largest = here > top ? here : top, shift = finite_or_zero(largest);
  Vector sum{};
  for (int64_t j = 0; j < vectors; ++j) {
    v[j] = exp_not_positive(v[j] - shift);
    sum += v[j];
  }
  const float factor = exp_approx(top - shift);
  if (mass != 0.0f && factor != 1.0f) {
#pragma omp simd
    for (int64_t d = 0; d < padded; ++d) sums[d] *= factor;
  }
  mass = mass * factor + sum_of(sum);
  top = largest;
}

template <class T>
void forward_block(const PrefixAttention& x, const Sizes& size, const Sequence& s, const Block& block, int64_t window, ForwardScratch& own) {
  const int64_t vectors = size.padded / kLanes;
  for (int64_t i = 0; i < block.count; ++i) {
    pack_row(row_of<T>(x.q, block.token[i], block.head[i]), size.dim, size.dim, x.scale, own.queries + i * size.stride);
    own.top[i] = kMinusInf, own.mass[i] = 0.0f;
  }
  prefetch_written<T>(x.out, block, size.dim);
  prefetch_next<T>(x.q, block, kForwardRows, x.heads / x.kv_heads, x.starts[x.sequences], size.dim);
  bool more = false;
  for (int64_t p = first_panel(s, block), panels = s.panels(); p < panels;) {
    Panel panel = panel_of(s, p);
    if (panel.column >= block.high) break;
    const int64_t begin = panel.column;
    int64_t end = begin;
    for (;;) {
      const int64_t used = smaller(panel.count, block.high - panel.column), width = round_up(used, kLanes);
      if (used <= 0 || panel.column - begin + width > kChunk) break;
      product_of_rows(own.queries, size.stride, block.count, size.dim, own.keys + panel.offset * size.dim, panel.width, width / kLanes,
                      own.scores + (panel.column - begin), kChunk);
      end = panel.column + used;
      if (++p == panels) break;
      panel = panel_of(s, p);
    }
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t high = block.seen[i], low = larger(0, high - window);
      softmax_row(own.scores + i * kChunk, larger(low - begin, 0), smaller(high, end) - begin, end - begin, x.softcap, own.top[i],
                  own.mass[i], own.sums + i * size.padded, size.padded);
    }
    product<ByRow<kChunk>>(own.scores, block.count, end - begin, own.values + begin * size.padded, size.padded, vectors, own.sums,
                           size.padded, more);
    more = true;
  }
  for (int64_t i = 0; i < block.count; ++i) {
    unpack_row(own.sums + i * size.padded, size.dim, 1.0f / own.mass[i], row_of<T>(x.out, block.token[i], block.head[i]));
    x.lse[block.token[i] * x.heads + block.head[i]] = own.top[i] + __builtin_logf(own.mass[i]);
  }
}

template <class T>
void forward_sequence(const PrefixAttention& x, const Sizes& size, const Sequence& s, int64_t window, int64_t kv_head, ForwardScratch& own) {
  pack_transposed<T>(x.k, kv_head, s.start, s.count, size.dim, own.keys + round_up(s.before, kPanel) * size.dim);
  pack_rows<T>(x.v, kv_head, s.start, s.count, size.dim, size.padded, own.values + s.before * size.padded);
  const int64_t share = x.heads / x.kv_heads, rows = s.count * share;
  for (int64_t first = 0; first < rows; first += kForwardRows)
    forward_block<T>(x, size, s, Block(s, first, smaller(kForwardRows, rows - first), share, kv_head, window), window, own);
}

// ---- backward --------------------------------------------------------------------------------------------------------------

struct BackwardScratch {
  float *keys, *values;              // panels (dim, width), transposed
  float *key_rows, *d_keys, *d_values;  // (columns, padded)
  float *queries, *d_out, *d_queries;   // (rows, stride) twice, (rows, padded)
  float *p, *ds;                     // (rows, kPanel)
  float delta[kBackwardRows], lse[kBackwardRows];

  CLP_INLINE BackwardScratch(Arena arena, const Sizes& z) {
    keys = arena.take(z.panels * z.dim);
    values = arena.take(z.panels * z.dim);
    key_rows = arena.take(z.columns * z.padded);
    d_keys = arena.take(z.columns * z.padded);
    d_values = arena.take(z.columns * z.padded);
    queries = arena.take(kBackwardRows * z.stride);
    d_out = arena.take(kBackwardRows * z.stride);
    d_queries = arena.take(kBackwardRows * z.padded);
    p = arena.take(kBackwardRows * kPanel);
    ds = arena.take(kBackwardRows * kPanel);
  }
};

// p: the row's scores z become e^(z - lse); ds: d_out . v becomes the gradient of scale q.k. Zero outside [low, high).
void gradient_row(float* p, float* ds, int64_t low, int64_t high, int64_t width, float softcap, float lse, float delta) {
  if (softcap > 0.0f) {
    const float inverse = 1.0f / softcap;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const float t = tanh_approx(p[j] * inverse);
      p[j] = exp_approx(softcap * t - lse);
      ds[j] = p[j] * (ds[j] - delta) * (1.0f - t * t);
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      p[j] = exp_approx(p[j] - lse);
      ds[j] = p[j] * (ds[j] - delta);
    }
  }
  fill(p, 0, low, 0.0f);
  fill(p, high, width, 0.0f);
  fill(ds, 0, low, 0.0f);
  fill(ds, high, width, 0.0f);
}

template <class T>
void backward_block(const PrefixAttention& x, const Sizes& size, const Sequence& s, const Block& block, int64_t window,
                    BackwardScratch& own) {
  const int64_t vectors = size.padded / kLanes;
  const bool scores = x.dq.data || x.dk.data;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t token = block.token[i], head = block.head[i];
    float* d_out = own.d_out + i * size.stride;
    pack_row(row_of<T>(x.q, token, head), size.dim, size.padded, x.scale, own.queries + i * size.stride);
    pack_row(row_of<T>(x.d_out, token, head), size.dim, size.padded, 1.0f, d_out);
    const T* out = row_of<T>(x.out, token, head);
    float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
    for (int64_t d = 0; d < size.dim; ++d) delta += d_out[d] * load(out + d);
    own.delta[i] = delta, own.lse[i] = x.lse[token * x.heads + head];
  }
  if (x.dq.data) prefetch_written<T>(x.dq, block, size.dim);
  const HeadRows* const read[] = {&x.q, &x.d_out, &x.out};
  for (const HeadRows* rows : read)
    prefetch_next<T>(*rows, block, kBackwardRows, x.heads / x.kv_heads, x.starts[x.sequences], size.dim);
  bool more = false;
  for (int64_t p = first_panel(s, block), panels = s.panels(); p < panels; ++p) {
    const Panel panel = panel_of(s, p);
    const int64_t used = smaller(panel.count, block.high - panel.column), width = round_up(used, kLanes);
    if (used <= 0) break;
    product_of_rows(own.queries, size.stride, block.count, size.dim, own.keys + panel.offset * size.dim, panel.width, width / kLanes, own.p,
                    kPanel);
    if (scores)
      product_of_rows(own.d_out, size.stride, block.count, size.dim, own.values + panel.offset * size.dim, panel.width, width / kLanes,
                      own.ds, kPanel);
    else fill(own.ds, 0, kBackwardRows * kPanel, 0.0f);
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t high = block.seen[i], low = larger(0, high - window);
      gradient_row(own.p + i * kPanel, own.ds + i * kPanel, smaller(larger(low - panel.column, 0), width),
                   larger(0, smaller(high - panel.column, used)), width, x.softcap, own.lse[i], own.delta[i]);
    }
    if (x.dv.data)
      product<ByColumn<kPanel>>(own.p, used, block.count, own.d_out, size.stride, vectors, own.d_values + panel.column * size.padded,
                                size.padded, true);
    if (x.dk.data)
      product<ByColumn<kPanel>>(own.ds, used, block.count, own.queries, size.stride, vectors, own.d_keys + panel.column * size.padded,
                                size.padded, true);
    if (x.dq.data)
      product<ByRow<kPanel>>(own.ds, block.count, used, own.key_rows + panel.column * size.padded, size.padded, vectors, own.d_queries,
                             size.padded, more);
    more = true;
  }
  if (!x.dq.data) return;
  for (int64_t i = 0; i < block.count; ++i)
    unpack_row(own.d_queries + i * size.padded, size.dim, x.scale, row_of<T>(x.dq, block.token[i], block.head[i]));
}

template <class T>
void backward_sequence(const PrefixAttention& x, const Sizes& size, const Sequence& s, int64_t window, int64_t kv_head, BackwardScratch& own) {
  const int64_t panels = round_up(s.before, kPanel) * size.dim, rows_before = s.before * size.padded;
  pack_transposed<T>(x.k, kv_head, s.start, s.count, size.dim, own.keys + panels);
  pack_transposed<T>(x.v, kv_head, s.start, s.count, size.dim, own.values + panels);
  pack_rows<T>(x.k, kv_head, s.start, s.count, size.dim, size.padded, own.key_rows + rows_before);
  fill(own.d_keys + rows_before, 0, s.count * size.padded, 0.0f);
  fill(own.d_values + rows_before, 0, s.count * size.padded, 0.0f);
  const int64_t share = x.heads / x.kv_heads, rows = s.count * share;
  for (int64_t first = 0; first < rows; first += kBackwardRows)
    backward_block<T>(x, size, s, Block(s, first, smaller(kBackwardRows, rows - first), share, kv_head, window), window, own);
}

// The gradients of `count` keys and values from column `column` on, which are the tokens from `start` on.
template <class T>
void store_gradients(const PrefixAttention& x, const Sizes& size, int64_t kv_head, int64_t column, int64_t start, int64_t count,
                     const BackwardScratch& own) {
  for (int64_t t = 0; t < count; ++t) {
    if (x.dk.data) unpack_row(own.d_keys + (column + t) * size.padded, size.dim, 1.0f, row_of<T>(x.dk, start + t, kv_head));
    if (x.dv.data) unpack_row(own.d_values + (column + t) * size.padded, size.dim, 1.0f, row_of<T>(x.dv, start + t, kv_head));
  }
}

// ---- units of work -----------------------------------------------------------------------------------------------------------

// Sequences without a parent, largest work first (to within a factor of two: sorted by its exponent), and what continues each.
struct Units {
  int64_t* memory = nullptr;
  int64_t* roots;     // (count)
  int64_t* firsts;    // (sequences + 1): root r is continued by children[firsts[r]] to children[firsts[r + 1]]
  int64_t* children;
  int64_t count = 0, pairs = 0;  // pairs of a query token and a key, without a window
  Sizes size{};

  explicit Units(const PrefixAttention& x) {
    const int64_t n = x.sequences;
    memory = static_cast<int64_t*>(std::calloc(4 * n + 1, sizeof(int64_t)));
    if (!memory) return;
    roots = memory, firsts = memory + n, children = firsts + n + 1;
    int64_t* work = children + n;
    size = {x.dim, round_up(x.dim, kLanes), row_stride(x.dim), 0, 0};
    for (int64_t s = 0; s < n; ++s)
      if (x.parents[s] >= 0) ++firsts[x.parents[s] + 1];
    for (int64_t s = 0; s < n; ++s) firsts[s + 1] += firsts[s];
    for (int64_t s = 0; s < n; ++s)
      if (const int64_t parent = x.parents[s]; parent >= 0) children[firsts[parent] + work[parent]++] = s;
    for (int64_t s = 0; s < n; ++s) work[s] = 0;
    int64_t of_exponent[65] = {};
    for (int64_t s = 0; s < n; ++s) {
      const int64_t parent = x.parents[s], tokens = x.starts[s + 1] - x.starts[s];
      const int64_t before = parent < 0 ? 0 : x.starts[parent + 1] - x.starts[parent];
      work[parent < 0 ? s : parent] += tokens * before + tokens * (tokens + 1) / 2;
      size.columns = larger(size.columns, before + tokens);
      size.panels = larger(size.panels, round_up(before, kPanel) + round_up(tokens, kPanel));
    }
    for (int64_t s = 0; s < n; ++s)
      if (x.parents[s] < 0 && work[s]) ++of_exponent[__builtin_clzll(work[s]) + 1], ++count, pairs += work[s];
    for (int i = 0; i < 64; ++i) of_exponent[i + 1] += of_exponent[i];
    for (int64_t s = 0; s < n; ++s)
      if (x.parents[s] < 0 && work[s]) roots[of_exponent[__builtin_clzll(work[s])]++] = s;
  }
  ~Units() { std::free(memory); }
  Units(const Units&) = delete;
};

CLP_INLINE Sequence sequence_of(const PrefixAttention& x, int64_t s) {
  const int64_t parent = x.parents[s], start = x.starts[s], count = x.starts[s + 1] - start;
  if (parent < 0) return {0, 0, start, count};
  return {x.starts[parent], x.starts[parent + 1] - x.starts[parent], start, count};
}

template <class T>
void forward_unit(const PrefixAttention& x, const Units& units, int64_t root, int64_t kv_head, Arena arena) {
  const int64_t window = x.window ? x.window : INT64_MAX;
  ForwardScratch own(arena, units.size);
  forward_sequence<T>(x, units.size, sequence_of(x, root), window, kv_head, own);
  for (int64_t c = units.firsts[root]; c < units.firsts[root + 1]; ++c) {
    const Sequence s = sequence_of(x, units.children[c]);
    if (s.count) forward_sequence<T>(x, units.size, s, window, kv_head, own);
  }
}

template <class T>
void backward_unit(const PrefixAttention& x, const Units& units, int64_t root, int64_t kv_head, Arena arena) {
  const int64_t window = x.window ? x.window : INT64_MAX;
  BackwardScratch own(arena, units.size);
  const Sequence prefix = sequence_of(x, root);
  backward_sequence<T>(x, units.size, prefix, window, kv_head, own);
  for (int64_t c = units.firsts[root]; c < units.firsts[root + 1]; ++c) {
    const Sequence s = sequence_of(x, units.children[c]);
    if (!s.count) continue;
    backward_sequence<T>(x, units.size, s, window, kv_head, own);
    store_gradients<T>(x, units.size, kv_head, s.before, s.start, s.count, own);
  }
  store_gradients<T>(x, units.size, kv_head, 0, prefix.start, prefix.count, own);
}

template <class Work>
CLP_INLINE bool each_unit(const PrefixAttention& x, const Units& units, int64_t floats, Work work) {
  if (!units.memory) return false;
  const int64_t count = units.count * x.kv_heads;
  if (!count) return true;
  constexpr int64_t serial = 1 << 16;  // products of a number below which a parallel region costs more than it saves
  const int threads = units.pairs * x.heads * x.dim < serial ? 1 : static_cast<int>(smaller(x.threads, count));
  const int64_t each = round_up(floats + kArenaSlack, 16);
  float* memory = static_cast<float*>(std::aligned_alloc(64, threads * each * sizeof(float)));
  if (!memory) return false;
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) work(units.roots[i / x.kv_heads], i % x.kv_heads, Arena{memory});
  } else {
    // Any thread may take any unit: each is computed by one, in an order of its own.
    int64_t next = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t)
      for (;;) {
        int64_t i;
#pragma omp atomic capture
        i = next++;
        if (i >= count) break;
        work(units.roots[i / x.kv_heads], i % x.kv_heads, Arena{memory + t * each});
      }
  }
  std::free(memory);
  return true;
}

bool forward(const PrefixAttention& x) {
  const Units units(x);
  return each_unit(x, units, units.size.forward(), [&](int64_t root, int64_t kv_head, Arena arena) {
    if (x.dtype == DType::f32) forward_unit<float>(x, units, root, kv_head, arena);
    else forward_unit<uint16_t>(x, units, root, kv_head, arena);
  });
}

bool backward(const PrefixAttention& x) {
  const Units units(x);
  return each_unit(x, units, units.size.backward(), [&](int64_t root, int64_t kv_head, Arena arena) {
    if (x.dtype == DType::f32) backward_unit<float>(x, units, root, kv_head, arena);
    else backward_unit<uint16_t>(x, units, root, kv_head, arena);
  });
}

}  // namespace

const PrefixAttentionKernels prefix_attention_kernels = {forward, backward};

}  // namespace clp::CLP_ISA
