// Both versions follow the same plan. B is packed, `kColumns` columns and `kDepth` of the contraction at a time, into panels that
// all threads share; each thread packs kRows rows of A into panels of its own, which stay in its L2, and runs the micro-kernel over
// every pair of panels. kDepth bounds a chain of float32 additions: C gathers one partial sum for each kDepth of the contraction.
// Threads own rows of C, or columns where there are too few rows.
#include "matmul.hpp"

#include <cstdlib>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "amx_tiles.hpp"
#include "kernels.hpp"
#include "vecmath.hpp"

namespace clp::CLP_ISA {
namespace {

constexpr int64_t kDepth = 512;

#ifdef __AMX_BF16__

// A panel is 32 rows of an operand: for each step of 32 along the contraction and each part, two tiles of 16 rows. A tile of A
// holds a row's 32 elements side by side; one of B holds them in pairs, (pair, row), which is what the instruction wants.
constexpr int64_t kPanelA = 32, kPanelB = 32;

// How a product's operands are packed and multiplied: in how many parts each.
struct Format {
  int parts_a, parts_b;

  Format(const Matmul& x) : parts_a(parts_of(x.terms[0].a, x)), parts_b(parts_of(x.terms[0].b, x)) {}
  static int parts_of(const MatmulOperand& operand, const Matmul& x) { return operand.dtype == DType::bf16 ? 1 : x.parts; }
  CLP_INLINE int64_t steps_of(int64_t depth) const { return (depth + kStep - 1) / kStep; }
  CLP_INLINE int64_t panel_bytes_a(int64_t steps) const { return steps * parts_a * 2 * kTile; }
  CLP_INLINE int64_t panel_bytes_b(int64_t steps) const { return steps * parts_b * 2 * kTile; }
  template <bool RIGHT>
  void pack(const MatmulOperand& x, int64_t row, int64_t rows, int64_t from, int64_t depth, char* to, int64_t step, int64_t steps) const;
};

template <class T, int PARTS, bool PAIRED>
void pack_panel(const MatmulOperand& x, int64_t row, int64_t rows, int64_t from, int64_t depth, char* to, int64_t part_stride) {
  const int64_t steps = (depth + kStep - 1) / kStep;
  const T* data = static_cast<const T*>(x.data) + row * x.row_stride + from * x.depth_stride;
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t height = rows - half * 16;
      const T* tile = data + half * 16 * x.row_stride + step * kStep * x.depth_stride;
      char* out = to + (step * 2 + half) * kTile;
      if (x.depth_stride == 1)
        pack_tile<T, PARTS, PAIRED, true>(tile, x.row_stride, height, smaller(depth - step * kStep, kStep), out, part_stride);
      else
        pack_tile<T, PARTS, PAIRED, false>(tile, x.depth_stride, height, smaller(depth - step * kStep, kStep), out, part_stride);
    }
}

template <bool RIGHT>
void Format::pack(const MatmulOperand& x, int64_t row, int64_t rows, int64_t from, int64_t depth, char* to, int64_t step,
                  int64_t steps) const {
  const int64_t part_stride = steps * 2 * kTile;
  const int parts = RIGHT ? parts_b : parts_a;
  to += step * 2 * kTile;
  if (x.dtype == DType::bf16) return pack_panel<uint16_t, 1, RIGHT>(x, row, rows, from, depth, to, part_stride);
  if (parts == 3) return pack_panel<float, 3, RIGHT>(x, row, rows, from, depth, to, part_stride);
  if (parts == 2) return pack_panel<float, 2, RIGHT>(x, row, rows, from, depth, to, part_stride);
  pack_panel<float, 1, RIGHT>(x, row, rows, from, depth, to, part_stride);
}

// Tiles 0 to 3 are the accumulators, 4 and 5 a panel of A, 6 and 7 one of B.
#define CLP_LOAD_A(part) \
  _tile_loadd(4, a + ((part) * steps + step) * 2 * kTile, 64); \
  _tile_loadd(5, a + ((part) * steps + step) * 2 * kTile + kTile, 64)
#define CLP_LOAD_B(part) \
  _tile_loadd(6, b + ((part) * steps + step) * 2 * kTile, 64); \
  _tile_loadd(7, b + ((part) * steps + step) * 2 * kTile + kTile, 64)
#define CLP_MULTIPLY \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)

// c (rows, columns) = or += the product of two panels. PARTS of A and of B differ only where one of them is bfloat16 (1).
template <int PARTS_A, int PARTS_B>
void micro(const char* a, const char* b, int64_t steps, const float* bias, float* c, int64_t stride, int64_t rows, int64_t columns,
                      bool add) {
  if (bias) {  // kPanelB of it; a stride of 0 gives it to every row
    _tile_loadd(0, bias, 0);
    _tile_loadd(1, bias + 16, 0);
    _tile_loadd(2, bias, 0);
    _tile_loadd(3, bias + 16, 0);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // Small products first, so that they are not lost in a large sum.
  for (int64_t step = 0; step < steps; ++step) {
    if (PARTS_A == 3 && PARTS_B == 3) {
      CLP_LOAD_A(2); CLP_LOAD_B(0); CLP_MULTIPLY;
      CLP_LOAD_A(1); CLP_MULTIPLY;
      CLP_LOAD_B(1); CLP_MULTIPLY;
      CLP_LOAD_A(0); CLP_MULTIPLY;
      CLP_LOAD_B(2); CLP_MULTIPLY;
      CLP_LOAD_B(0); CLP_MULTIPLY;
    } else if (PARTS_A == 2 && PARTS_B == 2) {
      CLP_LOAD_A(1); CLP_LOAD_B(0); CLP_MULTIPLY;
      CLP_LOAD_A(0); CLP_LOAD_B(1); CLP_MULTIPLY;
      CLP_LOAD_B(0); CLP_MULTIPLY;
    } else if (PARTS_A > PARTS_B) {
      CLP_LOAD_B(0);
      if (PARTS_A > 2) { CLP_LOAD_A(2); CLP_MULTIPLY; }
      CLP_LOAD_A(1); CLP_MULTIPLY;
      CLP_LOAD_A(0); CLP_MULTIPLY;
    } else if (PARTS_A < PARTS_B) {
      CLP_LOAD_A(0);
      if (PARTS_B > 2) { CLP_LOAD_B(2); CLP_MULTIPLY; }
      CLP_LOAD_B(1); CLP_MULTIPLY;
      CLP_LOAD_B(0); CLP_MULTIPLY;
    } else {
      CLP_LOAD_A(0); CLP_LOAD_B(0); CLP_MULTIPLY;
    }
  }
  if (!add && rows == kPanelA && columns == kPanelB) {
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, c + 16, stride * 4);
    _tile_stored(2, c + 16 * stride, stride * 4);
    _tile_stored(3, c + 16 * stride + 16, stride * 4);
    return;
  }
  alignas(64) float sums[kPanelA * kPanelB];
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 512, 128);
  _tile_stored(3, sums + 528, 128);
  const __mmask16 left = first(columns), right = first(columns - 16);
  for (int64_t row = 0; row < rows; ++row) {
    float* to = c + row * stride;
    __m512 x = _mm512_load_ps(sums + row * 32), y = _mm512_load_ps(sums + row * 32 + 16);
    if (add) {
      x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(left, to));
      y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(right, to + 16));
    }
    _mm512_mask_storeu_ps(to, left, x);
    _mm512_mask_storeu_ps(to + 16, right, y);
  }
}

using Micro = void (*)(const char*, const char*, int64_t, const float*, float*, int64_t, int64_t, int64_t, bool);

Micro choose(const Format& format) {
  static constexpr Micro table[3][3] = {{micro<1, 1>, micro<1, 2>, micro<1, 3>},
                                        {micro<2, 1>, micro<2, 2>, nullptr},
                                        {micro<3, 1>, nullptr, micro<3, 3>}};
  return table[format.parts_a - 1][format.parts_b - 1];
}

#else

// Panels: of A `kPanelA` rows, (step, rows); of B kPanelB columns, (step, columns). A step is one element of the contraction as
// float32, or, where the instruction set multiplies bfloat16 and both operands are bfloat16, a pair of them: four bytes either way.
// The accumulators fill the registers.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kPanelA = 8, kPanelB = 48;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8, kPanelA = 6, kPanelB = 16;
#elif defined(__aarch64__)
constexpr int64_t kLanes = 4, kPanelA = 8, kPanelB = 12;
#else
constexpr int64_t kLanes = 4, kPanelA = 4, kPanelB = 8;
#endif
constexpr int64_t kChain = 64;  // additions in a row: their rounding errors grow with its root
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

#ifdef __AVX512BF16__
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// How a product's operands are packed and multiplied.
struct Format {
  bool pairs;

  Format(const Matmul& x) : pairs(kPairs && x.terms[0].a.dtype == DType::bf16 && x.terms[0].b.dtype == DType::bf16) {}
  CLP_INLINE int64_t steps_of(int64_t depth) const { return pairs ? (depth + 1) / 2 : depth; }
  CLP_INLINE int64_t panel_bytes_a(int64_t steps) const { return round_up(steps * kPanelA * 4, 64); }
  CLP_INLINE int64_t panel_bytes_b(int64_t steps) const { return round_up(steps * kPanelB * 4, 64); }
  template <bool RIGHT>
  void pack(const MatmulOperand& x, int64_t row, int64_t rows, int64_t from, int64_t depth, char* to, int64_t step, int64_t) const;
};

template <class T, int64_t PANEL>
void pack_panel(const MatmulOperand& x, int64_t row, int64_t rows, int64_t from, int64_t depth, float* to) {
  const T* data = static_cast<const T*>(x.data) + row * x.row_stride + from * x.depth_stride;
  for (int64_t p = 0; p < depth; ++p)
    for (int64_t i = 0; i < PANEL; ++i) to[p * PANEL + i] = i < rows ? load(data + i * x.row_stride + p * x.depth_stride) : 0.0f;
}

// The earlier element of a pair in the low half; zeros beyond the rows and the depth.
template <int64_t PANEL>
void pack_pairs(const MatmulOperand& x, int64_t row, int64_t rows, int64_t from, int64_t depth, uint32_t* to) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data) + row * x.row_stride + from * x.depth_stride;
  for (int64_t p = 0; p < depth; p += 2, to += PANEL)
    for (int64_t i = 0; i < PANEL; ++i) {
      const uint16_t* at = data + i * x.row_stride + p * x.depth_stride;
      const uint32_t low = i < rows ? at[0] : 0, high = i < rows && p + 1 < depth ? at[x.depth_stride] : 0;
      to[i] = low | high << 16;
    }
}

template <bool RIGHT>
void Format::pack(const MatmulOperand& x, int64_t row, int64_t rows, int64_t from, int64_t depth, char* to, int64_t step, int64_t) const {
  constexpr int64_t panel = RIGHT ? kPanelB : kPanelA;
  to += step * panel * 4;
  if (pairs) pack_pairs<panel>(x, row, rows, from, depth, reinterpret_cast<uint32_t*>(to));
  else if (x.dtype == DType::bf16) pack_panel<uint16_t, panel>(x, row, rows, from, depth, reinterpret_cast<float*>(to));
  else pack_panel<float, panel>(x, row, rows, from, depth, reinterpret_cast<float*>(to));
}

template <bool PAIRS>
CLP_INLINE void multiply_add(Vector& sum, float a, Vector b) {
#ifdef __AVX512BF16__
  if constexpr (PAIRS) {
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
    return;
  }
#endif
  sum += a * b;
}

template <bool PAIRS>
void micro(const char* a_panel, const char* b_panel, int64_t steps, const float* bias, float* c, int64_t stride, int64_t rows,
           int64_t columns, bool add) {
  constexpr int64_t vectors = kPanelB / kLanes;
  const float* a = reinterpret_cast<const float*>(a_panel);
  const Vector* b = reinterpret_cast<const Vector*>(b_panel);
  int64_t from = 0;
  do {
    Vector sums[kPanelA][vectors] = {};
    if (bias)
      for (int64_t i = 0; i < kPanelA; ++i) std::memcpy(sums[i], bias, sizeof sums[i]);
    for (int64_t p = from; p < smaller(steps, from + kChain); ++p, a += kPanelA, b += vectors) {
      const LaneFactors<kPanelA> left(a);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kPanelA; ++i)
#pragma GCC unroll 8
        for (int64_t v = 0; v < vectors; ++v) multiply_add<PAIRS>(sums[i][v], left[i], b[v]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      alignas(64) float row[kPanelB];
      std::memcpy(row, sums[i], sizeof row);
      float* to = c + i * stride;
      for (int64_t j = 0; j < columns; ++j) to[j] = add ? to[j] + row[j] : row[j];
    }
    add = true, bias = nullptr;
  } while ((from += kChain) < steps);
}

using Micro = void (*)(const char*, const char*, int64_t, const float*, float*, int64_t, int64_t, int64_t, bool);
Micro choose(const Format& format) { return format.pairs ? micro<kPairs> : micro<false>; }

struct Tiles {
  Tiles() {}
};

#endif

constexpr int64_t kRows = 256 / kPanelA * kPanelA, kColumns = 2048 / kPanelB * kPanelB;

// A piece of the contraction that is packed and multiplied at a time: kDepth of the first term, the second term with its last piece.
struct Piece {
  int64_t from[2], depth[2];
};

struct Plan {
  const Matmul& x;
  Format format;
  int64_t pieces, bytes_a, bytes_b;  // bytes of one panel of the deepest piece
  Micro micro;

  explicit Plan(const Matmul& given) : x(given), format(given), micro(choose(format)) {
    pieces = x.terms[0].k > kDepth ? (x.terms[0].k + kDepth - 1) / kDepth : 1;
    const int64_t deepest = steps_of({{0, 0}, {smaller(x.terms[0].k, kDepth), x.terms[1].k}});
    bytes_a = format.panel_bytes_a(deepest);
    bytes_b = format.panel_bytes_b(deepest);
  }

  CLP_INLINE int64_t steps_of(const Piece& piece) const { return format.steps_of(piece.depth[0]) + format.steps_of(piece.depth[1]); }

  Piece piece(int64_t i) const {
    const bool last = i == pieces - 1;
    return {{i * kDepth, 0}, {last ? x.terms[0].k - i * kDepth : kDepth, last ? x.terms[1].k : 0}};
  }

  template <bool RIGHT>
  void pack_both(const Piece& piece, int64_t row, int64_t rows, char* to) const {
    for (int t = 0; t < 2; ++t)
      if (piece.depth[t])
        format.pack<RIGHT>(RIGHT ? x.terms[t].b : x.terms[t].a, row, rows, piece.from[t], piece.depth[t], to,
                           t ? format.steps_of(piece.depth[0]) : 0, steps_of(piece));
  }

  // Rows [row, last) of C, and `columns` of its columns from `column` on, whose panels are `packed`.
  void multiply(const Piece& piece, int64_t row, int64_t last, int64_t column, int64_t columns, const char* packed, char* scratch) const {
    const bool first = piece.from[0] == 0;
    for (; row < last; row += kRows) {
      const int64_t rows = smaller(last - row, kRows);
      const int64_t panels = (rows + kPanelA - 1) / kPanelA;
      for (int64_t i = 0; i < panels; ++i)
        pack_both<false>(piece, row + i * kPanelA, smaller(rows - i * kPanelA, kPanelA), scratch + i * bytes_a);
      for (int64_t j = 0; j < columns; j += kPanelB) {
        const int64_t width = smaller(columns - j, kPanelB);
        alignas(64) float bias[kPanelB] = {};
        if (x.bias && first) std::memcpy(bias, x.bias + column + j, width * sizeof(float));
        for (int64_t i = 0; i < panels; ++i)
          micro(scratch + i * bytes_a, packed + j / kPanelB * bytes_b, steps_of(piece), x.bias && first ? bias : nullptr,
                x.c + (row + i * kPanelA) * x.c_stride + column + j, x.c_stride, smaller(rows - i * kPanelA, kPanelA), width,
                x.accumulate || !first);
      }
    }
  }
};

template <class Work>
CLP_INLINE void each_thread(int threads, Work work) {
  if (threads == 1) return work(0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) work(t);
}

bool matmul(const Matmul& x) {
  if (x.m == 0 || x.n == 0) return true;
  const Plan plan(x);
  const int64_t row_panels = (x.m + kPanelA - 1) / kPanelA, column_panels = (x.n + kPanelB - 1) / kPanelB;
  const bool by_rows = row_panels >= x.threads;
  const int threads = static_cast<int>(smaller(x.threads, by_rows ? row_panels : column_panels));
  const int64_t shared = smaller(column_panels, kColumns / kPanelB) * plan.bytes_b;
  const int64_t own = smaller(row_panels, kRows / kPanelA) * plan.bytes_a;
  char* packed = static_cast<char*>(std::aligned_alloc(64, shared + threads * own));
  if (!packed) return false;
  char* scratch = packed + shared;
  for (int64_t column = 0; column < x.n; column += kColumns) {
    const int64_t columns = smaller(x.n - column, kColumns), panels = (columns + kPanelB - 1) / kPanelB;
    for (int64_t i = 0; i < plan.pieces; ++i) {
      const Piece piece = plan.piece(i);
      auto pack_share = [&](int t) {
        for (int64_t j = panels * t / threads; j < panels * (t + 1) / threads; ++j)
          plan.pack_both<true>(piece, column + j * kPanelB, smaller(columns - j * kPanelB, kPanelB), packed + j * plan.bytes_b);
      };
      if (by_rows) {
        each_thread(threads, pack_share);
        each_thread(threads, [&](int t) {
          const Tiles tiles;
          plan.multiply(piece, row_panels * t / threads * kPanelA, smaller(row_panels * (t + 1) / threads * kPanelA, x.m), column, columns,
                        packed, scratch + t * own);
        });
      } else {
        each_thread(threads, [&](int t) {
          const Tiles tiles;
          pack_share(t);
          const int64_t j0 = panels * t / threads, j1 = panels * (t + 1) / threads;
          plan.multiply(piece, 0, x.m, column + j0 * kPanelB, smaller(columns, j1 * kPanelB) - j0 * kPanelB, packed + j0 * plan.bytes_b,
                        scratch + t * own);
        });
      }
    }
  }
  std::free(packed);
  return true;
}

}  // namespace
#ifdef __AMX_BF16__
const MatmulKernels matmul_kernels = {{true, true}, matmul};
#else
const MatmulKernels matmul_kernels = {{false, kPairs}, matmul};
#endif

}  // namespace clp::CLP_ISA
