// A step is a list of stages; within one, each thread has a fixed share of rows, of columns or of (rows, head) pairs, and between
// two of them all threads meet. What a thread computes of an element does not depend on its share.
#include "decoder.hpp"

#include <cmath>
#include <cstdlib>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.hpp"
#include "packed_panels.hpp"
#include "vecmath.hpp"

namespace clp::CLP_ISA {
namespace {

constexpr int64_t kTaskRows = 8;  // rows of one prompt that read its keys and values together
constexpr float infinity = std::numeric_limits<float>::infinity();

struct Team {
  int thread, threads;

  CLP_INLINE void meet() const {
    if (threads > 1) {
#pragma omp barrier
    }
  }
  CLP_INLINE int64_t first(int64_t n) const { return n * thread / threads; }
  CLP_INLINE int64_t last(int64_t n) const { return n * (thread + 1) / threads; }
};

CLP_INLINE int64_t aligned(int64_t n) { return round_up(n, kAlign); }

CLP_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Buffers of one step, all threads'. Rows are padded to whole tiles: products write them.
struct Buffers {
  int64_t rows;  // rounded up
  float *x, *y, *attended, *low;
  char *input, *gated;
  float* own;  // of one thread: rows of a block, or the scores and outputs of a task
};

struct Sizes {
  int64_t rows, x, y, attended, low, input, gated, own, longest;

  Sizes(const DecoderModel& m, const DecoderBatch& b) {
    rows = round_up(b.rows, 32);
    longest = 0;
    for (int64_t i = 0; i < b.rows; ++i) longest = larger(longest, b.length[b.prompt[i]]);
    const int64_t inner = m.heads * m.width, inner_kv = m.kv_heads * m.width;
    int64_t rank = 0, parts = 0;
    const auto count = [&](const DecoderInput& input) {
      int64_t bytes = 0;
      for (int i = 0; i < input.count; ++i) bytes += rows_bytes(rows, input.linears[i].rank);
      parts = larger(parts, bytes);
      rank = larger(rank, input.rank);
    };
    for (int64_t i = 0; i < m.layer_count; ++i) {
      const DecoderLayer& l = m.layers[i];
      count(l.qkv), count(l.output), count(l.gate_up), count(l.down);
    }
    count(m.head);
    const int64_t widest = larger(larger(m.hidden, inner), larger(m.intermediate, rank));
    x = rows * aligned(m.hidden);
    y = rows * larger(larger(aligned(inner) + 2 * aligned(inner_kv), 2 * aligned(m.intermediate)), aligned(m.hidden));
    attended = rows * aligned(inner);
    low = rows * aligned(rank);
    input = rows_bytes(rows, widest);
    gated = parts;
    const int64_t queries = kTaskRows * (m.heads / m.kv_heads);
    own = larger(kBlockRows * aligned(widest),
                 queries * (aligned(longest) + aligned(b.room) + aligned(m.width) + aligned(m.width)));
  }
};

// e^x / (1 + e^x) without overflow.
CLP_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_approx(-x)); }

// To about 1 ulp: Cephes' polynomial near zero, where 1 - 2 / (e^2x + 1) has cancelled.
CLP_INLINE float tanh_approx(float x) {
  const float z = x * x, size = std::fabs(x);
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = p * z * x + x;
  const float far = 1.0f - 2.0f / (exp_approx(2.0f * size) + 1.0f);
  return size < 0.625f ? small : x < 0 ? -far : far;
}

CLP_INLINE void rms_norm(const float* x, const float* gain, int64_t n, float eps, float* y) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * scale * gain[i];
}

void activate(Activation kind, const float* gate, const float* up, int64_t n, float* y) {
  if (kind == Activation::silu) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
  } else {  // (1 + tanh(u)) / 2 is sigmoid(2u)
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float g = gate[i], u = 0.7978845608028654f * (g + 0.044715f * g * g * g);
      y[i] = g * sigmoid(2.0f * u) * up[i];
    }
  }
}

// -- attention ------------------------------------------------------------------------------------------------------------------

// scores[i][s] = q_i . k_s for QUERIES queries and VECTORS vectors of positions; keys (width, `length`).
template <int QUERIES, int VECTORS>
CLP_INLINE void score_block(const float* q, int64_t q_stride, const float* keys, int64_t length, int64_t width, float* scores,
                            int64_t stride) {
  Vector sums[QUERIES][VECTORS] = {};
  for (int64_t d = 0; d < width; ++d) {
    Vector key[VECTORS];
    for (int v = 0; v < VECTORS; ++v) key[v] = load_vector(keys + d * length + v * kLanes);
    for (int i = 0; i < QUERIES; ++i)
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += q[i * q_stride + d] * key[v];
  }
  for (int i = 0; i < QUERIES; ++i)
    for (int v = 0; v < VECTORS; ++v) store_vector(scores + i * stride + v * kLanes, sums[i][v]);
}

// out[i] += sum_s p_i[s] v_s for `count` positions; values (positions, `width`), VECTORS vectors of their elements.
template <int QUERIES, int VECTORS>
CLP_INLINE void value_block(const float* p, int64_t p_stride, const float* values, int64_t width, int64_t count, float* out,
                            int64_t stride) {
  Vector sums[QUERIES][VECTORS];
  for (int i = 0; i < QUERIES; ++i)
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = load_vector(out + i * stride + v * kLanes);
  for (int64_t s = 0; s < count; ++s) {
    Vector value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) value[v] = load_vector(values + s * width + v * kLanes);
    for (int i = 0; i < QUERIES; ++i)
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += p[i * p_stride + s] * value[v];
  }
  for (int i = 0; i < QUERIES; ++i)
    for (int v = 0; v < VECTORS; ++v) store_vector(out + i * stride + v * kLanes, sums[i][v]);
}

template <int QUERIES>
void score_queries(const float* q, int64_t q_stride, const float* keys, int64_t length, int64_t width, int64_t from, int64_t to,
                   float* scores, int64_t stride) {
  int64_t s = from;
  for (; s + 4 * kLanes <= to; s += 4 * kLanes)
    score_block<QUERIES, 4>(q, q_stride, keys + s, length, width, scores + s, stride);
  for (; s < to; s += kLanes) score_block<QUERIES, 1>(q, q_stride, keys + s, length, width, scores + s, stride);
}

template <int QUERIES>
void value_queries(const float* p, int64_t p_stride, const float* values, int64_t width, int64_t count, float* out, int64_t stride) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes)
    value_block<QUERIES, 4>(p, p_stride, values + d, width, count, out + d, stride);
  for (; d + 2 * kLanes <= width; d += 2 * kLanes)
    value_block<QUERIES, 2>(p, p_stride, values + d, width, count, out + d, stride);
  for (; d < width; d += kLanes) value_block<QUERIES, 1>(p, p_stride, values + d, width, count, out + d, stride);
}

// scores[i][s] for positions [from, to), multiples of 16, and `queries` queries.
void score(const float* q, int64_t q_stride, int64_t queries, const float* keys, int64_t length, int64_t width, int64_t from, int64_t to,
           float* scores, int64_t stride) {
  for (; queries >= 4; queries -= 4, q += 4 * q_stride, scores += 4 * stride)
    score_queries<4>(q, q_stride, keys, length, width, from, to, scores, stride);
  if (queries == 3) score_queries<3>(q, q_stride, keys, length, width, from, to, scores, stride);
  if (queries == 2) score_queries<2>(q, q_stride, keys, length, width, from, to, scores, stride);
  if (queries == 1) score_queries<1>(q, q_stride, keys, length, width, from, to, scores, stride);
}

void add_values(const float* p, int64_t p_stride, int64_t queries, const float* values, int64_t width, int64_t count, float* out,
                int64_t stride) {
  for (; queries >= 4; queries -= 4, p += 4 * p_stride, out += 4 * stride)
    value_queries<4>(p, p_stride, values, width, count, out, stride);
  if (queries == 3) value_queries<3>(p, p_stride, values, width, count, out, stride);
  if (queries == 2) value_queries<2>(p, p_stride, values, width, count, out, stride);
  if (queries == 1) value_queries<1>(p, p_stride, values, width, count, out, stride);
}

CLP_INLINE void hide(float* scores, int64_t from, int64_t to) {
  for (int64_t s = from; s < to; ++s) scores[s] = -infinity;
}

// Scores to e^(score - largest), in place; returns 1 / their sum. The scores lie in two pieces.
CLP_INLINE float soften(float* scores, int64_t from, int64_t to, float* more, int64_t count, float softcap) {
  float largest = -infinity;
  float* pieces[2] = {scores + from, more};
  const int64_t sizes[2] = {to - from, count};
  for (int i = 0; i < 2; ++i) {
    float* z = pieces[i];
    if (softcap > 0) {
      const float inverse = 1.0f / softcap;
#pragma omp simd
      for (int64_t s = 0; s < sizes[i]; ++s) z[s] = z[s] == -infinity ? z[s] : softcap * tanh_approx(z[s] * inverse);
    }
#pragma omp simd reduction(max : largest)
    for (int64_t s = 0; s < sizes[i]; ++s) largest = z[s] > largest ? z[s] : largest;
  }
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    float* z = pieces[i];
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < sizes[i]; ++s) {
      const float e = exp_approx(z[s] - largest);
      z[s] = e;
      sum += e;
    }
  }
  return 1.0f / sum;
}

struct Step {
  const DecoderModel& m;
  const DecoderBatch& b;
  Buffers at;
  Team team;

  int64_t q_stride() const { return aligned(m.heads * m.width); }
  int64_t kv_stride() const { return aligned(m.kv_heads * m.width); }
  float* queries() const { return at.y; }
  float* keys() const { return at.y + at.rows * q_stride(); }
  float* values() const { return keys() + at.rows * kv_stride(); }

  // Calls work(row, where) for this thread's rows, block by block, and packs what it wrote to `where` (depth elements).
  template <class Work>
  CLP_INLINE void pack_rows(int64_t depth, char* packed, const Work& work) const {
    const int64_t blocks = blocks_of(b.rows), stride = aligned(depth);
    for (int64_t block = team.first(blocks); block < team.last(blocks); ++block) {
      const int64_t row = block * kBlockRows, rows = smaller(b.rows - row, kBlockRows);
      for (int64_t i = 0; i < rows; ++i) work(row + i, at.own + i * stride);
      pack_block(at.own, stride, block, rows, depth, packed);
    }
  }

  // The layers of one input, which is packed in at.input: outputs[i] (rows, aligned n). Ends before all threads have met.
  void project(const DecoderInput& input, float* const* outputs, int64_t last_stride = 0) const {
    const DecoderLinear* linears = input.linears;
    const char* gated[3] = {};
    if (input.lora_a) {
      const int64_t panels = panels_of(input.rank), stride = aligned(input.rank);
      multiply({at.input, input.lora_a, linears[0].k}, {nullptr, nullptr, 0}, b.rows, input.rank, team.first(panels), team.last(panels),
               nullptr, at.low, stride);
      team.meet();
      char* to = at.gated;
      int64_t column = 0;
      for (int i = 0; i < input.count; ++i) {
        const int64_t rank = linears[i].rank;
        if (!rank) continue;
        pack_rows(rank, to, [&](int64_t row, float* where) {
          const float *h = at.low + row * stride + column, *gate = linears[i].gate + b.prompt[row] * rank;
          for (int64_t r = 0; r < rank; ++r) where[r] = h[r] * gate[r];
        });
        gated[i] = to;
        to += rows_bytes(at.rows, rank);
        column += rank;
      }
      team.meet();
    }
    int64_t panels = 0;
    for (int i = 0; i < input.count; ++i) panels += panels_of(linears[i].n);
    int64_t from = team.first(panels), to = team.last(panels);
    for (int i = 0; i < input.count; ++i) {
      const DecoderLinear& x = linears[i];
      const int64_t own = panels_of(x.n);
      if (from < own && to > 0)
        multiply({at.input, x.weight, x.k, x.parts}, {gated[i], x.lora_b, x.rank}, b.rows, x.n, larger(from, 0), smaller(to, own), x.bias,
                 outputs[i], last_stride ? last_stride : aligned(x.n));
      from -= own, to -= own;
    }
  }

  // Queries and keys: norms and rotation; keys and values to the row's own.
  void place(const DecoderLayer& layer, int64_t index) const {
    const int64_t width = m.width, wide = aligned(width), half = m.rotary / 2;
    for (int64_t row = team.first(b.rows); row < team.last(b.rows); ++row) {
      float *q = queries() + row * q_stride(), *k = keys() + row * kv_stride();
      const float* v = values() + row * kv_stride();
      const int64_t position = b.length[b.prompt[row]] + b.filled[row];
      const float *cos = layer.cos + position * m.rotary, *sin = layer.sin + position * m.rotary;
      for (int which = 0; which < 2; ++which) {
        float* x = which ? k : q;
        const float* gain = which ? layer.k_norm : layer.q_norm;
        const int64_t heads = which ? m.kv_heads : m.heads;
        if (gain && m.whole_qk_norm) rms_norm(x, gain, heads * width, m.eps, x);
        for (int64_t head = 0; head < heads; ++head, x += width) {
          if (gain && !m.whole_qk_norm) rms_norm(x, gain, width, m.eps, x);
          for (int64_t d = 0; d < half; ++d) {
            const float lo = x[d], hi = x[d + half];
            x[d] = lo * cos[d] - hi * sin[d];
            x[d + half] = hi * cos[d + half] + lo * sin[d + half];
          }
          if (!which)
            for (int64_t d = 0; d < width; ++d) x[d] *= m.attention_scale;
        }
      }
      const int64_t at = (b.slot[row] * m.layer_count + index) * m.kv_heads;
      float* own_keys = b.keys + at * width * b.room + b.filled[row];
      float* own_values = b.values + (at * b.room + b.filled[row]) * wide;
      for (int64_t head = 0; head < m.kv_heads; ++head) {
        for (int64_t d = 0; d < width; ++d) own_keys[(head * width + d) * b.room] = k[head * width + d];
        std::memcpy(own_values + head * b.room * wide, v + head * width, width * sizeof(float));
      }
    }
  }

  // Rows [row, last) of one prompt and the queries that share a head of keys and values.
  void attend(const DecoderLayer& layer, int64_t index, int64_t row, int64_t last, int64_t head) const {
    const int64_t width = m.width, wide = aligned(width), group = m.heads / m.kv_heads, prompt = b.prompt[row];
    const int64_t length = b.length[prompt], padded = aligned(length), stride = padded + b.room;
    const float* keys = reinterpret_cast<const float*>(b.prompt_keys[prompt]) + (index * m.kv_heads + head) * width * padded;
    const float* values = reinterpret_cast<const float*>(b.prompt_values[prompt]) + (index * m.kv_heads + head) * padded * wide;
    float* q = at.own;
    float* out = q + kTaskRows * group * wide;
    float* scores = out + kTaskRows * group * wide;
    // With a window, the oldest key that any of these rows sees.
    int64_t from = 0, least = b.filled[row];
    for (int64_t i = row; i < last; ++i) {
      least = smaller(least, b.filled[i]);
      for (int64_t j = 0; j < group; ++j)
        std::memcpy(q + ((i - row) * group + j) * wide, queries() + i * q_stride() + (head * group + j) * width, width * sizeof(float));
    }
    if (layer.window) from = smaller(larger(length + least - layer.window + 1, 0) / kAlign * kAlign, padded);
    const int64_t count = (last - row) * group;
    score(q, wide, count, keys, padded, width, from, padded, scores, stride);
    for (int64_t i = row; i < last; ++i) {
      const int64_t filled = b.filled[i] + 1, oldest = layer.window ? larger(length + filled - layer.window, 0) : 0;
      const int64_t slot = (b.slot[i] * m.layer_count + index) * m.kv_heads + head;
      const int64_t first = (i - row) * group, own_from = larger(oldest - length, 0) / kAlign * kAlign;
      float* own = scores + first * stride + padded;
      score(q + first * wide, wide, group, b.keys + slot * width * b.room, b.room, width, own_from, aligned(filled), own, stride);
      for (int64_t j = 0; j < group; ++j) {
        float* z = scores + (first + j) * stride;
        float* to = out + (first + j) * wide;
        // Where the row itself begins, whatever the others see: sums in the same order.
        const int64_t mine = smaller(oldest / kAlign * kAlign, padded);
        hide(z, mine, smaller(oldest, padded));
        hide(z, larger(length, mine), padded);
        hide(z + padded, own_from, oldest - length);
        const float scale = soften(z, mine, padded, z + padded + own_from, filled - own_from, m.attention_softcap);
        for (int64_t s = from; s < mine; ++s) z[s] = 0;
        for (int64_t s = mine; s < padded; ++s) z[s] *= scale;
        for (int64_t s = own_from; s < filled; ++s) z[padded + s] *= scale;
        for (int64_t d = 0; d < wide; ++d) to[d] = 0;
      }
    }
    add_values(scores + from, stride, count, values + from * wide, wide, larger(length - from, 0), out, wide);
    for (int64_t i = row; i < last; ++i) {
      const int64_t filled = b.filled[i] + 1, oldest = layer.window ? larger(length + filled - layer.window, 0) : 0;
      const int64_t slot = (b.slot[i] * m.layer_count + index) * m.kv_heads + head;
      const int64_t first = (i - row) * group, own_from = larger(oldest - length, 0);
      add_values(scores + first * stride + padded + own_from, stride, group, b.values + (slot * b.room + own_from) * wide, wide,
                 filled - own_from, out + first * wide, wide);
      for (int64_t j = 0; j < group; ++j)
        std::memcpy(at.attended + i * q_stride() + (head * group + j) * width, out + (first + j) * wide, width * sizeof(float));
    }
  }

  void attend_all(const DecoderLayer& layer, int64_t index) const {
    // Tasks are counted in the order of rows, and shared out by number.
    int64_t blocks = 0;
    const auto each_block = [&](const auto& work) {
      int64_t number = 0;
      for (int64_t row = 0, last; row < b.rows; row = last, ++number) {
        for (last = row + 1; last < b.rows && last < row + kTaskRows && b.prompt[last] == b.prompt[row];) ++last;
        work(number, row, last);
      }
    };
    each_block([&](int64_t, int64_t, int64_t) { ++blocks; });
    const int64_t from = team.first(blocks * m.kv_heads), to = team.last(blocks * m.kv_heads);
    each_block([&](int64_t number, int64_t row, int64_t last) {
      for (int64_t head = 0; head < m.kv_heads; ++head)
        if (const int64_t task = number * m.kv_heads + head; task >= from && task < to) attend(layer, index, row, last, head);
    });
  }

  // x += scale * norm(y) where there is something to add, then at.input = norm(x).
  void add_and_norm(const float* y_norm, bool add, const float* x_norm) const {
    const int64_t stride = aligned(m.hidden);
    pack_rows(m.hidden, at.input, [&](int64_t row, float* where) {
      float* x = at.x + row * stride;
      if (add) {
        const float* y = at.y + row * stride;
        if (y_norm) {
          rms_norm(y, y_norm, m.hidden, m.eps, where);
          y = where;
        }
#pragma omp simd
        for (int64_t i = 0; i < m.hidden; ++i) x[i] += m.residual_scale * y[i];
      }
      if (x_norm) rms_norm(x, x_norm, m.hidden, m.eps, where);
      else std::memcpy(where, x, m.hidden * sizeof(float));
    });
    team.meet();
  }

  void layer(int64_t index) const {
    const DecoderLayer& l = m.layers[index];
    const DecoderLayer* before = index ? &l - 1 : nullptr;
    add_and_norm(before ? before->norm_out : nullptr, before, l.norm_attention);
    float* const qkv[3] = {queries(), keys(), values()};
    project(l.qkv, qkv);
    team.meet();
    place(l, index);
    team.meet();
    attend_all(l, index);
    team.meet();
    pack_rows(m.heads * m.width, at.input, [&](int64_t row, float* where) {
      std::memcpy(where, at.attended + row * q_stride(), m.heads * m.width * sizeof(float));
    });
    team.meet();
    float* const y[1] = {at.y};
    project(l.output, y);
    team.meet();
    add_and_norm(l.norm_attended, true, l.norm_mlp);
    const int64_t stride = aligned(m.intermediate);
    float* const gate_up[2] = {at.y, at.y + at.rows * stride};
    project(l.gate_up, gate_up);
    team.meet();
    pack_rows(m.intermediate, at.input, [&](int64_t row, float* where) {
      activate(m.activation, gate_up[0] + row * stride, gate_up[1] + row * stride, m.intermediate, where);
    });
    team.meet();
    project(l.down, y);
    team.meet();
  }

  void run() const {
    const Tiles tiles;
    const int64_t stride = aligned(m.hidden);
    for (int64_t row = team.first(b.rows); row < team.last(b.rows); ++row) {
      const float* from = m.embedding + b.tokens[row] * m.hidden;
      for (int64_t i = 0; i < m.hidden; ++i) at.x[row * stride + i] = from[i] * m.embedding_scale;
    }
    team.meet();
    for (int64_t i = 0; i < m.layer_count; ++i) layer(i);
    add_and_norm(m.layers[m.layer_count - 1].norm_out, true, m.norm);
    float* const logits[1] = {b.logits};
    project(m.head, logits, b.logit_stride);
    if (m.logit_scale == 1.0f && m.logit_softcap <= 0) return;
    const int64_t panels = panels_of(m.vocab), from = team.first(panels) * kPanelColumns;
    const int64_t to = smaller(team.last(panels) * kPanelColumns, m.vocab);
    const float scale = m.logit_scale, cap = m.logit_softcap, inverse = cap > 0 ? 1.0f / cap : 0.0f;
    for (int64_t row = 0; row < b.rows; ++row) {
      float* z = b.logits + row * b.logit_stride;
      if (cap > 0) {
#pragma omp simd
        for (int64_t i = from; i < to; ++i) z[i] = cap * tanh_approx(z[i] * scale * inverse);
      } else {
#pragma omp simd
        for (int64_t i = from; i < to; ++i) z[i] *= scale;
      }
    }
  }
};

// Calls work(team) on each thread, inside one parallel region; for one thread outside of any.
template <class Work>
CLP_INLINE void together(int threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads()});  // there may be fewer than asked for
    return;
  }
#endif
  work(Team{0, 1});
}

int64_t own_floats(const Sizes& sizes) { return aligned(sizes.own); }

int64_t scratch_bytes(const DecoderModel& m, const DecoderBatch& b, int threads) {
  const Sizes sizes(m, b);
  const int64_t floats = sizes.x + sizes.y + sizes.attended + sizes.low + threads * own_floats(sizes);
  return round_up(floats * sizeof(float) + sizes.input + sizes.gated, 64);
}

void step(const DecoderModel& m, const DecoderBatch& b, char* scratch, int threads) {
  if (b.rows == 0) return;
  const Sizes sizes(m, b);
  Buffers at{};
  at.rows = sizes.rows;
  at.x = reinterpret_cast<float*>(scratch);
  at.y = at.x + sizes.x;
  at.attended = at.y + sizes.y;
  at.low = at.attended + sizes.attended;
  at.input = reinterpret_cast<char*>(at.low + sizes.low);
  at.gated = at.input + sizes.input;
  float* own = reinterpret_cast<float*>(at.gated + sizes.gated);
  together(threads, [&](const Team& team) {
    Buffers mine = at;
    mine.own = own + team.thread * own_floats(sizes);
    Step{m, b, mine, team}.run();
  });
}

int64_t packed_bytes(int64_t n, int64_t k, int parts) { return round_up(weight_bytes(n, k, parts), 64); }

void pack(const float* weight, int64_t row_stride, int64_t depth_stride, int64_t n, int64_t k, int parts, char* packed, int threads) {
  const int64_t panels = panels_of(n);
  together(threads, [&](const Team& team) {
    for (int64_t j = team.first(panels); j < team.last(panels); ++j) {
      const int64_t column = j * kPanelColumns;
      pack_columns(weight + column * row_stride, row_stride, depth_stride, smaller(n - column, kPanelColumns), k,
                   parts, packed + j * column_step(kPanelColumns, parts) * steps_of(k));
    }
  });
}

bool product(const float* x, int64_t x_stride, int64_t rows, const char* weight, int64_t n, int64_t k, int parts, float* y,
             int64_t y_stride, int threads) {
  char* packed = static_cast<char*>(std::aligned_alloc(64, rows_bytes(rows, k)));
  if (!packed) return false;
  together(threads, [&](const Team& team) {
    const Tiles tiles;
    const int64_t blocks = blocks_of(rows), panels = panels_of(n);
    for (int64_t block = team.first(blocks); block < team.last(blocks); ++block)
      pack_block(x + block * kBlockRows * x_stride, x_stride, block, smaller(rows - block * kBlockRows, kBlockRows), k, packed);
    team.meet();
    multiply({packed, weight, k, parts}, {nullptr, nullptr, 0}, rows, n, team.first(panels), team.last(panels), nullptr, y, y_stride);
  });
  std::free(packed);
  return true;
}

}  // namespace

#ifdef __AMX_BF16__
const DecoderKernels decoder_kernels = {true, packed_bytes, pack, product, scratch_bytes, step};
#else
const DecoderKernels decoder_kernels = {false, packed_bytes, pack, product, scratch_bytes, step};
#endif

}  // namespace clp::CLP_ISA
