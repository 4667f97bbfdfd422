// AMX tiles, for the products that run on them: 16 rows of 64 bytes, and operands packed into them as bfloat16 parts.
#pragma once
#ifdef __AMX_BF16__
#include <immintrin.h>

#include <cstdint>

#include "vecmath.hpp"

namespace clp::CLP_ISA {

constexpr int64_t kTile = 1024, kStep = 32;  // bytes of a tile, and what it holds of the contraction

// 16 x 16 doublewords in 16 registers.
CLP_INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

CLP_INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

CLP_INLINE __m512 widen(__m256i half) {  // bfloat16 to float32
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

CLP_INLINE __m512 load16(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
CLP_INLINE __m512 load16(const uint16_t* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }

// The next bfloat16 part of 32 numbers, and what it leaves of them. An infinity leaves NaN.
CLP_INLINE __m512i take_part(__m512& lo, __m512& hi) {
  const __m512i part = (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
  lo = _mm512_sub_ps(lo, widen(_mm512_castsi512_si256(part)));
  hi = _mm512_sub_ps(hi, widen(_mm512_extracti64x4_epi64(part, 1)));
  return part;
}

// One tile of every part, out of `rows` rows (at most 16) and `depth` of the contraction (at most 32), zeros around them.
template <class T, int PARTS, bool PAIRED, bool ALONG>
CLP_INLINE void pack_tile(const T* from, int64_t stride, int64_t rows, int64_t depth, char* to, int64_t part_stride) {
  __m512i tiles[PARTS][16];
  alignas(64) static constexpr uint16_t interleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(interleave);
  for (int i = 0; i < 16; ++i) {
    __m512 lo = _mm512_setzero_ps(), hi = lo;
    if (ALONG) {  // a row's contraction is contiguous: register i is row i
      if (i < rows) {
        lo = load16(from + i * stride, first(depth));
        if (depth > 16) hi = load16(from + i * stride + 16, first(depth - 16));
      }
    } else {  // rows are contiguous: register i is the pair (2i, 2i + 1) of every row
      if (2 * i < depth) lo = load16(from + 2 * i * stride, first(rows));
      if (2 * i + 1 < depth) hi = load16(from + (2 * i + 1) * stride, first(rows));
    }
    for (int part = 0; part < PARTS; ++part) {
      const __m512i taken = take_part(lo, hi);
      tiles[part][i] = ALONG ? taken : _mm512_permutexvar_epi16(order, taken);
    }
  }
  for (int part = 0; part < PARTS; ++part) {
    if (ALONG == PAIRED) transpose(tiles[part]);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(reinterpret_cast<__m512i*>(to + part * part_stride + i * 64), tiles[part][i]);
  }
}

// The tile registers of this thread, as long as this lives. What was configured before is put back: other users of the tiles
// (oneDNN) remember what they configured.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    const TileConfig ours;
    _tile_loadconfig(&ours);
  }
  ~Tiles() {
    if (before_.palette) _tile_loadconfig(&before_);
    else _tile_release();
  }

 private:
  TileConfig before_;
};

}  // namespace clp::CLP_ISA
#endif
