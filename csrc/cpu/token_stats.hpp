// Token statistics over a chunk of the vocabulary: log-prob, entropy, exact KL in both directions, in one pass.
//
//   u = (raw + bias) * logit_scale;  z = (softcap > 0 ? softcap * tanh(u / softcap) : u) * inv_temperature[row]
//
// Forward keeps a running state per row, in double (the per-chunk sums are float32):
//   m_p = max z_p         s_p = sum e^(z_p - m_p)   a_p = sum e^(z_p - m_p) (z_p - m_p)   d_p = sum e^(z_p - m_p) (z_p - z_q)
//   m_q = max z_q         s_q = sum e^(z_q - m_q)   d_q = sum e^(z_q - m_q) (z_q - z_p)   t_p, t_q = z at the target
// The difference z_p - z_q is formed in float32 before anything is rounded: near the reference it is all there is.
//
// Backward writes d(loss)/d(raw) of the policy, from z recomputed out of raw and
//   p = e^(z_p - m_p) / s_p,  q = e^(z_q - m_q) / s_q
//   dz = p (c0 + c1 (z_p - m_p) + c2 (z_p - z_q)) + c3 q + ct [column is the target]
// where the five coefficients per row gather every output's incoming gradient (token_stats.py derives them).
//
// Where the head is frozen, a statistic's derivative in the hidden state is made of sums over the columns of a term times a row of
// the weight, and such a sum needs nothing of the columns to come but their maximum:
//   kTermP   e^(z_p - m_p)        kTermD   e^(z_p - m_p) (z_p - z_q - centre)
// each times 1 - tanh^2 where there is a softcap. `centre` is the mean of z_p - z_q over the row's first columns: the mean over all
// is subtracted in the end, and would take what is small with it if it were large. The target's column is 0; the caller adds it by
// itself, as beside a probability near 1 the others would be lost. Forward writes the terms that are asked for, with the maximum as
// it stands after the chunk, and brings the sums that the caller has of earlier chunks to that maximum.
//
// A logit of -inf is a masked column: p = 0 there, and it adds nothing to any sum or gradient.
#pragma once
#include <cstdint>

#include "instruction_sets.hpp"

namespace clp {

enum class DType : int;

enum TokenStatFlag : int { kStatReference = 1, kStatEntropy = 2, kStatKl = 4, kStatReverseKl = 8 };

enum TokenState : int { kMp, kSp, kAp, kDp, kMq, kSq, kDq, kTp, kTq, kTokenStates };
enum TokenSaved : int { kSavedMp, kSavedInvSp, kSavedMq, kSavedInvSq, kTokenSaved };
enum TokenCoef : int { kC0, kC1, kC2, kC3, kCt, kTokenCoefs };
enum TokenTerm : int { kTermP, kTermD, kTokenTerms };

struct TokenStatsChunk {
  const void* policy = nullptr;      // (rows, cols) raw logits of dtype
  const void* reference = nullptr;   // (rows, cols) or null
  int64_t policy_stride = 0, reference_stride = 0;
  DType dtype{};
  int64_t rows = 0, cols = 0, first_column = 0;
  const float* bias = nullptr;             // (cols) or null
  const float* reference_bias = nullptr;   // (cols) or null
  float logit_scale = 1.0f, softcap = 0.0f;
  const float* inv_temperature = nullptr;  // (rows)
  const int64_t* targets = nullptr;        // (rows) or null
  int64_t ignore_index = -100;             // rows whose target this is are left alone forward, zeroed backward
  int flags = 0;                           // TokenStatFlag: which sums to keep (forward), whether z_q is read (backward)
  int threads = 1;
  // forward
  double* state = nullptr;                 // (kTokenStates, state_stride), this chunk's first row
  int64_t* top1 = nullptr;                 // (rows) column of the first maximum so far, or null
  int64_t state_stride = 0;
  // terms[kTermP] null: none are asked for. A term may be written where policy or reference lie, if they are float32.
  float* terms[kTokenTerms] = {};          // (rows, cols), `cols` apart, or null
  float* term_sums[kTokenTerms] = {};      // (rows, term_width) sums over earlier chunks, or null
  int64_t term_sums_stride = 0, term_width = 0;
  float* centre = nullptr;                 // (rows), where there is a kTermD; set when a row's first sum is there
  // backward
  const float* saved = nullptr;            // (kTokenSaved, row_stride)
  const float* coefs = nullptr;            // (kTokenCoefs, row_stride)
  int64_t row_stride = 0;
  void* out = nullptr;                     // (rows, cols) of out_dtype; may be `policy` itself where the dtypes agree
  int64_t out_stride = 0;
  DType out_dtype{};
};

struct TokenStatsKernels {
  void (*forward)(const TokenStatsChunk&);
  void (*backward)(const TokenStatsChunk&);
};

CLP_IN_EACH_ISA(extern const TokenStatsKernels token_stats_kernels;)

}  // namespace clp
