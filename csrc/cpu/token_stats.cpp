// See token_stats.hpp for the formulas. Rows are shared out over threads; a row is worked through in blocks that stay in L1:
// one loop turns raw logits into z and finds their maximum, a second one does the exponentials and the sums.
#include "token_stats.hpp"

#include <cmath>
#include <limits>

#include "kernels.hpp"
#include "vecmath.hpp"

namespace clp::CLP_ISA {

namespace {

constexpr int64_t kBlock = 1024;             // columns per block: four arrays of a block are 16 KB
constexpr int64_t kSerialElements = 1 << 15;  // below this a parallel region costs more than it saves
// Columns summed in float32 before they join the double state. A lane of a narrow vector adds up more of them, with an
// error that grows with their number.
#ifdef __AVX2__
constexpr int64_t kPiece = kBlock;
#else
constexpr int64_t kPiece = 64;
#endif
constexpr float kInf = std::numeric_limits<float>::infinity(), kMinusInf = -kInf;

struct Transform {
  const float* bias;
  float logit_scale, softcap, inv_temperature;
};

// z of one block, and its maximum; with a softcap, `tanhs` receives tanh(u / softcap), whose square the gradient needs.
template <typename T>
CLP_INLINE float transform(const T* raw, const Transform& f, int64_t n, float* z, float* tanhs) {
  // Two factors, not their rounded product: its error would be the same in every logit and end up in lse.
  const float scale = f.logit_scale, outer = f.softcap > 0.0f ? 1.0f : f.inv_temperature;
  float top = kMinusInf;
  if (f.bias) {
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) {
      z[j] = (load(raw + j) + f.bias[j]) * scale * outer;
      top = z[j] > top ? z[j] : top;
    }
  } else {
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) {
      z[j] = load(raw + j) * scale * outer;
      top = z[j] > top ? z[j] : top;
    }
  }
  if (f.softcap > 0.0f) {
    const float inv_cap = 1.0f / f.softcap;
    top = kMinusInf;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) {
      tanhs[j] = tanh_approx(z[j] * inv_cap);
      z[j] = f.softcap * tanhs[j] * f.inv_temperature;
      top = z[j] > top ? z[j] : top;
    }
  }
  return top;
}

struct Sums {
  float s_p = 0, a_p = 0, d_p = 0, s_q = 0, d_q = 0;
};

// es receives the policy's exponentials: a store into L1 costs nothing beside them.
template <bool REFERENCE, bool ENTROPY, bool KL, bool REVERSE>
CLP_INLINE Sums accumulate(const float* zp, const float* zq, float m_p, float m_q, int64_t n, float* es) {
  float s_p = 0, a_p = 0, d_p = 0, s_q = 0, d_q = 0;
#pragma omp simd reduction(+ : s_p, a_p, d_p, s_q, d_q)
  for (int64_t j = 0; j < n; ++j) {
    const float z = zp[j], shifted = z - m_p, difference = REFERENCE ? z - zq[j] : 0.0f;
    const float e = exp_approx(shifted);
    es[j] = e;
    s_p += e;
    // e == 0 covers masked columns, where the factor is infinite or NaN; a NaN logit still reaches s_p and so every output.
    // Factors are chosen, and loaded before that: compilers without masked vectors make a branch of `e > 0 ? e * x : 0`.
    if (ENTROPY) a_p += e * (e > 0.0f ? shifted : 0.0f);
    if (KL) d_p += e * (e > 0.0f ? difference : 0.0f);
    if (REFERENCE) {
      const float f = exp_approx(zq[j] - m_q);
      s_q += f;
      if (REVERSE) d_q -= f * (f > 0.0f ? difference : 0.0f);
    }
  }
  return {s_p, a_p, d_p, s_q, d_q};
}

CLP_INLINE Sums accumulate_as_asked(int flags, const float* zp, const float* zq, float m_p, float m_q, int64_t n, float* es) {
  switch (flags) {
    case 0: return accumulate<false, false, false, false>(zp, zq, m_p, m_q, n, es);
    case kStatEntropy: return accumulate<false, true, false, false>(zp, zq, m_p, m_q, n, es);
    case kStatReference: return accumulate<true, false, false, false>(zp, zq, m_p, m_q, n, es);
    case kStatReference | kStatEntropy: return accumulate<true, true, false, false>(zp, zq, m_p, m_q, n, es);
    case kStatReference | kStatKl: return accumulate<true, false, true, false>(zp, zq, m_p, m_q, n, es);
    case kStatReference | kStatEntropy | kStatKl: return accumulate<true, true, true, false>(zp, zq, m_p, m_q, n, es);
    case kStatReference | kStatReverseKl: return accumulate<true, false, false, true>(zp, zq, m_p, m_q, n, es);
    case kStatReference | kStatEntropy | kStatReverseKl: return accumulate<true, true, false, true>(zp, zq, m_p, m_q, n, es);
    case kStatReference | kStatKl | kStatReverseKl: return accumulate<true, false, true, true>(zp, zq, m_p, m_q, n, es);
    default: return accumulate<true, true, true, true>(zp, zq, m_p, m_q, n, es);
  }
}

// Where a row is masked so far, the maximum is -inf, and -inf - -inf would be NaN: any finite stand-in gives e = 0. Where the
// maximum is +inf it gives e = inf, so that s is inf there, and NaN only where a logit is.
CLP_INLINE float finite_or_zero(float m) { return m == kMinusInf || m == kInf ? 0.0f : m; }

// The factor that brings sums relative to `from` to the new maximum `to`.
CLP_INLINE double rescale(double from, double to) { return from == to ? 1.0 : std::exp(from - to); }

// The same for terms that are there: where their sum s is 0, so are they.
CLP_INLINE float factor(double s, double from, double to) { return s == 0.0 ? 1.0f : static_cast<float>(rescale(from, to)); }

// The terms of a row, of which the first `done` columns are there.
struct TermRow {
  float *p, *d;  // d: null where not asked for

  CLP_INLINE void rescale(int64_t done, float k) const {
    if (k == 1.0f) return;
    if (d)
#pragma omp simd
      for (int64_t j = 0; j < done; ++j) d[j] *= k;
#pragma omp simd
    for (int64_t j = 0; j < done; ++j) p[j] *= k;
  }

  // n columns from `at` on; target: the column among them that stays 0, or outside.
  CLP_INLINE void write(int64_t at, int64_t n, int64_t target, const float* zp, const float* zq, float centre, const float* es,
                        const float* tanhs, bool capped) const {
    alignas(64) float slope[kBlock];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) slope[j] = capped ? 1.0f - tanhs[j] * tanhs[j] : 1.0f;
    if (target >= 0 && target < n) slope[target] = 0.0f;
    if (d)
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float e = es[j], difference = (zp[j] - zq[j]) - centre;
        d[at + j] = e * (e > 0.0f ? difference : 0.0f) * slope[j];
      }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) p[at + j] = es[j] * slope[j];
  }
};

CLP_INLINE TermRow term_row(float* const* terms, int64_t offset) {
  auto row = [&](int term) { return terms[term] ? terms[term] + offset : nullptr; };
  return {row(kTermP), row(kTermD)};
}

template <typename T>
void forward_row(const TokenStatsChunk& c, int64_t row) {
  const int64_t target = c.targets ? c.targets[row] : -1;
  if (c.targets && target == c.ignore_index) return;
  const T* policy = static_cast<const T*>(c.policy) + row * c.policy_stride;
  const T* reference = static_cast<const T*>(c.reference) + (c.reference ? row * c.reference_stride : 0);
  const bool with_reference = c.flags & kStatReference;
  double* state = c.state + row;
  const int64_t S = c.state_stride;
  const double s_before = state[kSp * S], m_before = state[kMp * S];
  const TermRow terms = term_row(c.terms, row * c.cols);
  alignas(64) float zp[kBlock], zq[kBlock], tanhs[kBlock], ref_tanhs[kBlock], es[kBlock];

  for (int64_t j0 = 0; j0 < c.cols; j0 += kBlock) {
    const int64_t n = c.cols - j0 < kBlock ? c.cols - j0 : kBlock;
    const Transform fp{c.bias ? c.bias + j0 : nullptr, c.logit_scale, c.softcap, c.inv_temperature[row]};
    const float top_p = transform(policy + j0, fp, n, zp, tanhs);
    const bool higher = top_p > state[kMp * S], nan_before = state[kSp * S] != state[kSp * S];
    const float m_p = top_p > state[kMp * S] ? top_p : static_cast<float>(state[kMp * S]);
    float m_q = 0.0f;
    if (with_reference) {
      const Transform fq{c.reference_bias ? c.reference_bias + j0 : nullptr, c.logit_scale, c.softcap, c.inv_temperature[row]};
      const float top_q = transform(reference + j0, fq, n, zq, ref_tanhs);
      m_q = top_q > state[kMq * S] ? top_q : static_cast<float>(state[kMq * S]);
    }

    const double s_earlier = state[kSp * S];
    if (terms.p && j0) terms.rescale(j0, factor(state[kSp * S], state[kMp * S], m_p));
    if (state[kSp * S] != 0.0) {
      const double shift = state[kMp * S] - m_p, k = rescale(state[kMp * S], m_p);
      state[kAp * S] = k * (state[kAp * S] + shift * state[kSp * S]);
      state[kSp * S] *= k;
      state[kDp * S] *= k;
    }
    state[kMp * S] = m_p;
    if (with_reference) {
      if (state[kSq * S] != 0.0) {
        const double k = rescale(state[kMq * S], m_q);
        state[kSq * S] *= k;
        state[kDq * S] *= k;
      }
      state[kMq * S] = m_q;
    }
    for (int64_t k = 0; k < n; k += kPiece) {
      const int64_t width = n - k < kPiece ? n - k : kPiece;
      const Sums sums = accumulate_as_asked(c.flags, zp + k, zq + k, finite_or_zero(m_p), finite_or_zero(m_q), width, es + k);
      state[kSp * S] += sums.s_p;
      state[kAp * S] += sums.a_p;
      state[kDp * S] += sums.d_p;
      state[kSq * S] += sums.s_q;
      state[kDq * S] += sums.d_q;
    }
    if (c.top1 && !nan_before) {  // the first NaN counts as the largest, as in torch's argmax
      const bool nan = state[kSp * S] != state[kSp * S];
      if (nan || higher || c.top1[row] < 0) {
        int64_t j = 0;
        while (j < n - 1 && (nan ? zp[j] == zp[j] : zp[j] != top_p)) ++j;
        c.top1[row] = c.first_column + j0 + j;
      }
    }
    const int64_t at = c.targets ? target - c.first_column - j0 : -1;
    if (at >= 0 && at < n) {
      state[kTp * S] = zp[at];
      if (with_reference) state[kTq * S] = zq[at];
    }
    if (terms.d && s_earlier == 0.0) {
      const float mean = static_cast<float>(state[kDp * S] / state[kSp * S]);
      c.centre[row] = mean - mean == 0.0f ? mean : 0.0f;  // not an infinity or NaN, of nothing but masked columns for one
    }
    if (terms.p) terms.write(j0, n, at, zp, zq, terms.d ? c.centre[row] : 0.0f, es, tanhs, c.softcap > 0.0f);
  }
  if (c.term_sums[kTermP])
    term_row(c.term_sums, row * c.term_sums_stride).rescale(c.term_width, factor(s_before, m_before, state[kMp * S]));
}

template <typename T, typename Out>
void backward_row(const TokenStatsChunk& c, int64_t row) {
  Out* out = static_cast<Out*>(c.out) + row * c.out_stride;
  const int64_t target = c.targets ? c.targets[row] : -1;
  if (c.targets && target == c.ignore_index) {
    for (int64_t j = 0; j < c.cols; ++j) store(out + j, 0.0f);
    return;
  }
  const T* policy = static_cast<const T*>(c.policy) + row * c.policy_stride;
  const T* reference = static_cast<const T*>(c.reference) + (c.reference ? row * c.reference_stride : 0);
  const bool with_reference = c.flags & kStatReference;
  const float* saved = c.saved + row;
  const float* coefs = c.coefs + row;
  const int64_t S = c.row_stride;
  const float m_p = finite_or_zero(saved[kSavedMp * S]), inv_s_p = saved[kSavedInvSp * S];
  const float c0 = coefs[kC0 * S], c1 = coefs[kC1 * S], c2 = coefs[kC2 * S], c3 = coefs[kC3 * S], ct = coefs[kCt * S];
  const float inv_temperature = c.inv_temperature[row];
  const float chain = c.logit_scale * inv_temperature;
  alignas(64) float zp[kBlock], zq[kBlock], g[kBlock], tanhs[kBlock];

  for (int64_t j0 = 0; j0 < c.cols; j0 += kBlock) {
    const int64_t n = c.cols - j0 < kBlock ? c.cols - j0 : kBlock;
    const Transform fp{c.bias ? c.bias + j0 : nullptr, c.logit_scale, c.softcap, inv_temperature};
    if (with_reference) {
      const float m_q = finite_or_zero(saved[kSavedMq * S]), inv_s_q = saved[kSavedInvSq * S];
      const Transform fq{c.reference_bias ? c.reference_bias + j0 : nullptr, c.logit_scale, c.softcap, inv_temperature};
      transform(reference + j0, fq, n, zq, tanhs);
      transform(policy + j0, fp, n, zp, tanhs);  // second, so that its tanhs are the ones left
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float shifted = zp[j] - m_p;
        const float p = exp_approx(shifted) * inv_s_p;
        const float q = exp_approx(zq[j] - m_q) * inv_s_q;
        g[j] = (p == 0.0f ? 0.0f : p * (c0 + c1 * shifted + c2 * (zp[j] - zq[j]))) + c3 * q;
      }
    } else {
      transform(policy + j0, fp, n, zp, tanhs);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float shifted = zp[j] - m_p;
        const float p = exp_approx(shifted) * inv_s_p;
        g[j] = p == 0.0f ? 0.0f : p * (c0 + c1 * shifted);
      }
    }
    const int64_t at = target - c.first_column - j0;
    if (c.targets && at >= 0 && at < n) g[at] += ct;
    if (c.softcap > 0.0f) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) store(out + j0 + j, g[j] * chain * (1.0f - tanhs[j] * tanhs[j]));
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) store(out + j0 + j, g[j] * chain);
    }
  }
}

template <typename Row>
void each_row(const TokenStatsChunk& c, Row row) {
  if (c.threads == 1 || c.rows * c.cols < kSerialElements) {
    // Outside any parallel region: entering one for a single thread is not free, and has libgomp rebuild its pool.
    for (int64_t i = 0; i < c.rows; ++i) row(c, i);
    return;
  }
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t i = 0; i < c.rows; ++i) row(c, i);
}

void forward(const TokenStatsChunk& c) {
  if (c.dtype == DType::f32) each_row(c, forward_row<float>);
  else each_row(c, forward_row<uint16_t>);
}

void backward(const TokenStatsChunk& c) {
  const bool wide_in = c.dtype == DType::f32, wide_out = c.out_dtype == DType::f32;
  if (wide_in && wide_out) each_row(c, backward_row<float, float>);
  else if (wide_in) each_row(c, backward_row<float, uint16_t>);
  else if (wide_out) each_row(c, backward_row<uint16_t, float>);
  else each_row(c, backward_row<uint16_t, uint16_t>);
}

}  // namespace

const TokenStatsKernels token_stats_kernels = {forward, backward};

}  // namespace clp::CLP_ISA
