// Scalar building blocks that the compiler turns into vector code inside `#pragma omp simd` loops.
//
// Everything lives in the instruction set's own namespace and is forced inline: an ordinary inline function (or a template
// of the standard library, such as std::vector) compiled once per instruction set would be merged by the linker into one
// copy, possibly the AVX-512 one, which the portable table would then call. Kernel sources keep to plain arrays for that reason.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#define CLP_INLINE inline __attribute__((always_inline))

namespace clp::CLP_ISA {

CLP_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CLP_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

CLP_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

CLP_INLINE float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// e^x to about 1 ulp for x in [-87.336, 88.722]; 0 below (denormal results are flushed), +inf above, NaN stays NaN.
// No branches and no calls. x = n ln2 + r, |r| <= ln2 / 2; degree-6 polynomial in r (minimax, Cephes' coefficients).
CLP_INLINE float exp_approx(float x) {
  constexpr float lowest = -87.3365478515625f, highest = 88.72283172607422f;
  constexpr float round_to_int = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const float t = x * 1.44269504088896341f + round_to_int;
  const float n = t - round_to_int;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  float y = bits_float(float_bits(p) + (float_bits(t) << 23));  // times 2^n: n is in t's low bits, the rest is shifted out
  // Each comparison is false for NaN, as a vector's are: NEON needs six instructions for one that is true.
  y = x >= lowest ? y : 0.0f;
  y = x <= highest ? y : std::numeric_limits<float>::infinity();
  return x == x ? y : x;
}

// tanh to about 1 ulp: Cephes' polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel.
CLP_INLINE float tanh_approx(float x) {
  const float y = x * x;
  float p = -5.70498872745e-3f;
  p = p * y + 2.06390887954e-2f;
  p = p * y - 5.37397155531e-2f;
  p = p * y + 1.33314422036e-1f;
  p = p * y - 3.33332819422e-1f;
  const float near = p * y * x + x;
  const float magnitude = __builtin_fabsf(x);
  const float far = 1.0f - 2.0f / (exp_approx(2.0f * magnitude) + 1.0f);
  return magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
}

// N floats from an address on, each a factor of whole vectors. NEON multiplies by a lane of a register, so that four of them are
// one load; elsewhere a factor is spread over a vector as it is loaded. May read up to the next multiple of four.
#ifdef __aarch64__
template <int64_t N>
struct LaneFactors {
  typedef float Four __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4)));
  Four lanes[(N + 3) / 4];
  CLP_INLINE explicit LaneFactors(const float* from) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < (N + 3) / 4; ++i) lanes[i] = *reinterpret_cast<const Unaligned*>(from + 4 * i);
  }
  CLP_INLINE float operator[](int64_t i) const { return lanes[i / 4][i % 4]; }
};
#else
template <int64_t N>
using LaneFactors = const float*;
#endif

CLP_INLINE float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN instead of being rounded up to infinity.
CLP_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// Loads and stores that let one loop body serve both storage types.
CLP_INLINE float load(const float* p) { return *p; }
CLP_INLINE float load(const uint16_t* p) { return bf16_to_float(*p); }
CLP_INLINE void store(float* p, float x) { *p = x; }
CLP_INLINE void store(uint16_t* p, float x) { *p = float_to_bf16(x); }

}  // namespace clp::CLP_ISA
