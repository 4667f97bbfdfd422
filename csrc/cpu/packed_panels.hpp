// Products of few rows with a matrix that was packed before: y = x W^T + bias [+ x' W'^T], in float32.
//
// A weight is packed into panels of `kPanelColumns` of its rows (columns of y), narrower at the end; x into panels of kPanelRows,
// kBlockRows of them at a time. In both, what belongs to one step of the contraction lies together and steps follow one another,
// so that a micro-kernel reads its two panels from front to back. On AMX tiles a step is 32 of the contraction in three bfloat16
// parts (matmul.hpp says why that is float32), or, of a weight that is bfloat16 whatever its dtype, as those of most checkpoints
// are, in one: a third of the bytes and half of the products, exactly the same sums but for zeros. Elsewhere a step is one, and a
// panel of columns is a few vectors wide.
//
// A long contraction is done in pieces of kDepth, whose panels stay in the cache for all rows; without tiles, whose sums are more
// exact than a float32 product's (fewer roundings), each piece is summed by itself, so that rounding errors grow less with the depth.
#pragma once
#include <cstdint>
#include <cstring>

#include "amx_tiles.hpp"
#include "vecmath.hpp"

namespace clp::CLP_ISA {

constexpr int64_t kAlign = 16;  // elements: rows of every activation begin at a multiple, and products write whole multiples

// A term of a product: packed rows, packed weight, their depth, and the parts of the weight where it has parts.
struct Factors {
  const char* rows;
  const char* weight;
  int64_t depth;
  int parts = 3;
};

#ifdef __AMX_BF16__

constexpr int64_t kLanes = 16, kBlockRows = 16, kPanelRows = 32, kPanelColumns = 32, kDepth = 512, kParts = 3;
constexpr int64_t kRowsStep = kParts * 2 * kTile;  // bytes of a panel of rows at each step

CLP_INLINE int64_t steps_of(int64_t depth) { return (depth + kStep - 1) / kStep; }
CLP_INLINE int64_t column_step(int64_t columns, int parts) { return parts * (columns > 16 ? 2 : 1) * kTile; }

template <int PARTS>
CLP_INLINE void pack_parts(const float* weight, int64_t row_stride, int64_t depth_stride, int64_t columns, int64_t depth, char* to) {
  const int64_t tiles = columns > 16 ? 2 : 1;
  for (int64_t step = 0; step < steps_of(depth); ++step, to += column_step(columns, PARTS))
    for (int64_t i = 0; i < tiles; ++i) {
      const float* from = weight + i * 16 * row_stride + step * kStep * depth_stride;
      const int64_t height = smaller(columns - i * 16, 16), deep = smaller(depth - step * kStep, kStep);
      if (depth_stride == 1) pack_tile<float, PARTS, true, true>(from, row_stride, height, deep, to + i * kTile, tiles * kTile);
      else pack_tile<float, PARTS, true, false>(from, depth_stride, height, deep, to + i * kTile, tiles * kTile);
    }
}

CLP_INLINE void pack_columns(const float* weight, int64_t row_stride, int64_t depth_stride, int64_t columns, int64_t depth, int parts,
                             char* to) {
  if (parts == 1) return pack_parts<1>(weight, row_stride, depth_stride, columns, depth, to);
  pack_parts<kParts>(weight, row_stride, depth_stride, columns, depth, to);
}

CLP_INLINE void pack_block(const float* x, int64_t stride, int64_t block, int64_t rows, int64_t depth, char* packed) {
  char* to = packed + block / 2 * steps_of(depth) * kRowsStep + block % 2 * kTile;
  for (int64_t step = 0; step < steps_of(depth); ++step, to += kRowsStep)
    pack_tile<float, kParts, false, true>(x + step * kStep, stride, rows, smaller(depth - step * kStep, kStep), to, 2 * kTile);
}

// Tiles 0 to 3 are the accumulators, 4 and 5 the rows, 6 and 7 the columns. PARTS are those of the first term's weight.
template <int ROWS, int COLUMNS, int PARTS>
void micro(const char* a, const char* b, int64_t steps, const char* more_a, const char* more_b, int64_t more, const float* bias,
           float* c, int64_t stride, bool add) {
#define CLP_START(from, row_stride)                                                             \
  _tile_loadd(0, (from), row_stride);                                                           \
  if constexpr (COLUMNS == 2) _tile_loadd(1, (from) + 16, row_stride);                          \
  if constexpr (ROWS == 2) _tile_loadd(2, (from) + 16 * (row_stride) / 4, row_stride);          \
  if constexpr (ROWS == 2 && COLUMNS == 2) _tile_loadd(3, (from) + 16 * (row_stride) / 4 + 16, row_stride)
#define CLP_LOAD_A(part)                     \
  _tile_loadd(4, a + (part) * 2 * kTile, 64); \
  if constexpr (ROWS == 2) _tile_loadd(5, a + (part) * 2 * kTile + kTile, 64)
#define CLP_LOAD_B(part)                           \
  _tile_loadd(6, b + (part) * COLUMNS * kTile, 64); \
  if constexpr (COLUMNS == 2) _tile_loadd(7, b + (part) * COLUMNS * kTile + kTile, 64)
#define CLP_MULTIPLY                                    \
  _tile_dpbf16ps(0, 4, 6);                              \
  if constexpr (COLUMNS == 2) _tile_dpbf16ps(1, 4, 7);  \
  if constexpr (ROWS == 2) _tile_dpbf16ps(2, 5, 6);     \
  if constexpr (ROWS == 2 && COLUMNS == 2) _tile_dpbf16ps(3, 5, 7)
  if (add) {
    CLP_START(c, stride * 4);
  } else if (bias) {  // a stride of 0 gives it to every row
    CLP_START(bias, 0);
  } else {
    _tile_zero(0);
    if constexpr (COLUMNS == 2) _tile_zero(1);
    if constexpr (ROWS == 2) _tile_zero(2);
    if constexpr (ROWS == 2 && COLUMNS == 2) _tile_zero(3);
  }
  if constexpr (PARTS == 1) {
    for (int64_t step = 0; step < steps; ++step, a += kRowsStep, b += COLUMNS * kTile) {
      CLP_LOAD_B(0);
      CLP_LOAD_A(2); CLP_MULTIPLY;
      CLP_LOAD_A(1); CLP_MULTIPLY;
      CLP_LOAD_A(0); CLP_MULTIPLY;
    }
    a = more_a, b = more_b, steps = more;
  }
  for (int term = PARTS == 1; term < 2; ++term) {
    for (int64_t step = 0; step < steps; ++step, a += kRowsStep, b += kParts * COLUMNS * kTile) {
      CLP_LOAD_A(2); CLP_LOAD_B(0); CLP_MULTIPLY;
      CLP_LOAD_A(1); CLP_MULTIPLY;
      CLP_LOAD_B(1); CLP_MULTIPLY;
      CLP_LOAD_A(0); CLP_MULTIPLY;
      CLP_LOAD_B(2); CLP_MULTIPLY;
      CLP_LOAD_B(0); CLP_MULTIPLY;
    }
    a = more_a, b = more_b, steps = more;
  }
  _tile_stored(0, c, stride * 4);
  if constexpr (COLUMNS == 2) _tile_stored(1, c + 16, stride * 4);
  if constexpr (ROWS == 2) _tile_stored(2, c + 16 * stride, stride * 4);
  if constexpr (ROWS == 2 && COLUMNS == 2) _tile_stored(3, c + 16 * stride + 16, stride * 4);
#undef CLP_START
#undef CLP_LOAD_A
#undef CLP_LOAD_B
#undef CLP_MULTIPLY
}

using Micro = void (*)(const char*, const char*, int64_t, const char*, const char*, int64_t, const float*, float*, int64_t, bool);

template <int PARTS>
CLP_INLINE Micro of_parts(int64_t rows, int64_t columns) {
  if (rows > 16) return columns > 16 ? micro<2, 2, PARTS> : micro<2, 1, PARTS>;
  return columns > 16 ? micro<1, 2, PARTS> : micro<1, 1, PARTS>;
}

CLP_INLINE Micro choose(int64_t rows, int64_t columns, int parts) {
  return parts == 1 ? of_parts<1>(rows, columns) : of_parts<kParts>(rows, columns);
}

#else

// The accumulators of kPanelRows x kPanelColumns fill the registers.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kPanelRows = 8, kPanelColumns = 48;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8, kPanelRows = 6, kPanelColumns = 16;
#elif defined(__aarch64__)
constexpr int64_t kLanes = 4, kPanelRows = 8, kPanelColumns = 12;
#else
constexpr int64_t kLanes = 4, kPanelRows = 4, kPanelColumns = 8;
#endif
constexpr int64_t kBlockRows = kPanelRows, kDepth = 128, kStep = 1;
constexpr int64_t kRowsStep = kPanelRows * sizeof(float);

struct Tiles {
  Tiles() {}
};

CLP_INLINE int64_t steps_of(int64_t depth) { return depth; }
CLP_INLINE int64_t column_step(int64_t columns, int) { return round_up(columns, kLanes) * sizeof(float); }

CLP_INLINE void pack_columns(const float* weight, int64_t row_stride, int64_t depth_stride, int64_t columns, int64_t depth, int,
                             char* packed) {
  float* to = reinterpret_cast<float*>(packed);
  const int64_t wide = round_up(columns, kLanes);
  for (int64_t p = 0; p < depth; ++p, to += wide)
    for (int64_t i = 0; i < wide; ++i) to[i] = i < columns ? weight[i * row_stride + p * depth_stride] : 0.0f;
}

CLP_INLINE void pack_block(const float* x, int64_t stride, int64_t block, int64_t rows, int64_t depth, char* packed) {
  float* to = reinterpret_cast<float*>(packed) + block * depth * kPanelRows;
  for (int64_t i = 0; i < kPanelRows; ++i)
    for (int64_t p = 0; p < depth; ++p) to[p * kPanelRows + i] = i < rows ? x[i * stride + p] : 0.0f;
}
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef float UnalignedVector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

CLP_INLINE Vector load_vector(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
CLP_INLINE void store_vector(float* p, Vector x) { *reinterpret_cast<UnalignedVector*>(p) = x; }

#ifndef __AMX_BF16__

// Large weights come from far away, and processors fetch ahead on their own only within a page: a fifth off a product of 32 rows.
// (Tiles read more in a piece, and gain nothing.)
constexpr int64_t kFetchAhead = 8192;
CLP_INLINE void fetch_ahead(const char* p, int64_t bytes) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + kFetchAhead + i, 0, 2);
}

template <int ROWS, int VECTORS>
void micro(const char* rows_a, const char* columns_b, int64_t steps, const char* more_a, const char* more_b, int64_t more,
           const float* bias, float* c, int64_t stride, bool add) {
  Vector sums[ROWS][VECTORS] = {};
  if (bias && !add) {
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = load_vector(bias + v * kLanes);
  }
  for (int term = 0; term < 2; ++term) {
    const float* a = reinterpret_cast<const float*>(rows_a);
    const float* b = reinterpret_cast<const float*>(columns_b);
    for (int64_t p = 0; p < steps; ++p, a += kPanelRows, b += VECTORS * kLanes) {
      fetch_ahead(reinterpret_cast<const char*>(b), VECTORS * kLanes * sizeof(float));
      const LaneFactors<ROWS> row(a);
      Vector column[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) column[v] = load_vector(b + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[i][v] += row[i] * column[v];
    }
    rows_a = more_a, columns_b = more_b, steps = more;
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) {
      float* to = c + i * stride + v * kLanes;
      store_vector(to, add ? load_vector(to) + sums[i][v] : sums[i][v]);
    }
}

using Micro = void (*)(const char*, const char*, int64_t, const char*, const char*, int64_t, const float*, float*, int64_t, bool);

template <int VECTORS>
CLP_INLINE Micro of_rows(int64_t rows) {
  static constexpr Micro table[] = {micro<1, VECTORS>, micro<2, VECTORS>, micro<3, VECTORS>, micro<4, VECTORS>,
                                    micro<5, VECTORS>, micro<6, VECTORS>, micro<7, VECTORS>, micro<8, VECTORS>};
  return table[rows - 1];
}

CLP_INLINE Micro choose(int64_t rows, int64_t columns, int) {
  rows = smaller(rows, kPanelRows);
  if (columns > 2 * kLanes) return of_rows<3>(rows);
  return columns > kLanes ? of_rows<2>(rows) : of_rows<1>(rows);
}

#endif

CLP_INLINE int64_t panels_of(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
CLP_INLINE int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// Bytes of a packed weight (n, depth), and of packed rows.
CLP_INLINE int64_t weight_bytes(int64_t n, int64_t depth, int parts) {
  const int64_t whole = n / kPanelColumns, rest = n % kPanelColumns;
  return steps_of(depth) * (whole * column_step(kPanelColumns, parts) + (rest ? column_step(rest, parts) : 0));
}
CLP_INLINE int64_t rows_bytes(int64_t rows, int64_t depth) {
  return round_up((rows + kPanelRows - 1) / kPanelRows * steps_of(depth) * kRowsStep, 64);
}

// Panels [from, to) of y, whose columns are n: y = sum of the terms (the second has all parts, and may have no depth) + bias.
CLP_INLINE void multiply(const Factors& main, const Factors& more, int64_t rows, int64_t n, int64_t from, int64_t to, const float* bias,
                         float* y, int64_t stride) {
  const int64_t steps = steps_of(main.depth), extra = steps_of(more.depth), piece = kDepth / kStep;
  for (int64_t j = from; j < to; ++j) {
    const int64_t column = j * kPanelColumns, columns = smaller(n - column, kPanelColumns);
    const int64_t step_bytes = column_step(columns, main.parts);
    const char* weight = main.weight + j * column_step(kPanelColumns, main.parts) * steps;
    const char* more_weight = extra ? more.weight + j * column_step(kPanelColumns, more.parts) * extra : nullptr;
    int64_t step = 0;
    do {
      const int64_t count = smaller(steps - step, piece), then = step + count == steps ? extra : 0;
      for (int64_t row = 0; row < rows; row += kPanelRows) {
        const int64_t panel = row / kPanelRows;
        choose(rows - row, columns, main.parts)(main.rows + (panel * steps + step) * kRowsStep, weight + step * step_bytes, count,
                                    then ? more.rows + panel * extra * kRowsStep : nullptr, more_weight, then,
                                    bias ? bias + column : nullptr, y + row * stride + column, stride, step > 0);
      }
      step += count;
    } while (step < steps);
  }
}

}  // namespace clp::CLP_ISA
