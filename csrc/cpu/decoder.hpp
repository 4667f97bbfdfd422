// One token for every row of a batch, through a whole decoder: the contract is clp_kernels/decoder.py.
//
// Weights are packed once into panels of columns, in the layout the micro-kernels want (`pack`); the low-rank factors, which
// change with every optimiser step, are packed the same way, once for a rollout. An element of a product is summed in an order
// that depends on the depth alone: a row's logits are the same bits whatever other rows are in the call, and however many
// threads there are. Activations are float32, (rows, width), rows at a multiple of 16 elements.
#pragma once
#include <cstdint>

#include "instruction_sets.hpp"

namespace clp {

// y = x W^T + bias [+ (h * gate[group]) B^T], h the part of the group's x A^T that is this layer's.
struct DecoderLinear {
  const char* weight = nullptr;   // (n, k), packed
  const float* bias = nullptr;    // (n, rounded up to 16), or null
  const char* lora_b = nullptr;   // (n, rank), packed
  const float* gate = nullptr;    // (prompts, rank)
  int64_t n = 0, k = 0, rank = 0;
  int parts = 3;  // of the packed weight; low-rank factors have all
};

// Linear layers that read the same x (rows, k).
struct DecoderInput {
  DecoderLinear linears[3];
  int count = 0;
  const char* lora_a = nullptr;  // all of their A, one below the other: (rank, k), packed
  int64_t rank = 0;
};

struct DecoderLayer {
  // Gains of the norms in front of attention and MLP and behind them, (hidden); null where the model has none.
  const float *norm_attention = nullptr, *norm_attended = nullptr, *norm_mlp = nullptr, *norm_out = nullptr;
  const float *q_norm = nullptr, *k_norm = nullptr;  // gains over each head, or over all heads (`whole_qk_norm`); or null
  DecoderInput qkv, output, gate_up, down;
  const float *cos = nullptr, *sin = nullptr;  // (positions, rotary)
  int64_t window = 0;                          // keys a query sees, itself included; 0: all
};

enum class Activation : int { silu = 0, gelu_tanh = 1 };

struct DecoderModel {
  int64_t hidden = 0, heads = 0, kv_heads = 0, width = 0, rotary = 0, intermediate = 0, vocab = 0;  // width: of a head
  Activation activation{};
  bool whole_qk_norm = false;
  float eps = 0, embedding_scale = 1, residual_scale = 1, attention_scale = 1;
  float attention_softcap = 0, logit_scale = 1, logit_softcap = 0;  // 0: no softcap
  const float* embedding = nullptr;  // (vocab, hidden)
  const float* norm = nullptr;       // (hidden)
  DecoderInput head;
  int64_t layer_count = 0;
  const DecoderLayer* layers = nullptr;
};

// The prompt's keys and values are there once and serve all its rows; rows add their own in slots of a common buffer. A layer's
// keys have their positions side by side, its values their elements: what the products with queries and probabilities want.
// `length` and `room` are rounded up to 16 positions, and a value's width to 16 elements; the rest is zero.
struct DecoderBatch {
  int64_t rows = 0, room = 0;
  const int64_t* tokens = nullptr;   // (rows)
  const int64_t* prompt = nullptr;   // (rows): which prompt; rows of one prompt are best side by side
  const int64_t* slot = nullptr;     // (rows): where its own keys and values are
  const int64_t* filled = nullptr;   // (rows): how many of them there are, without this token's
  const int64_t* length = nullptr;   // (prompts)
  const int64_t* prompt_keys = nullptr;    // (prompts) addresses of (layers, kv_heads, width, length)
  const int64_t* prompt_values = nullptr;  // (prompts) addresses of (layers, kv_heads, length, width)
  float* keys = nullptr;    // (slots, layers, kv_heads, width, room)
  float* values = nullptr;  // (slots, layers, kv_heads, room, width)
  float* logits = nullptr;  // (rows rounded up to 16, logit_stride)
  int64_t logit_stride = 0;
};

struct DecoderKernels {
  // Whether a float32 weight is taken as bfloat16 parts: three, or one where all of it is bfloat16 anyway. Elsewhere `parts` has
  // no meaning.
  bool has_parts;
  // Bytes of a packed (n, k) matrix, and packing it: element (i, p) is at weight[i * row_stride + p * depth_stride].
  int64_t (*packed_bytes)(int64_t n, int64_t k, int parts);
  void (*pack)(const float* weight, int64_t row_stride, int64_t depth_stride, int64_t n, int64_t k, int parts, char* packed, int threads);
  // y (rows rounded up to 16, y_stride) = x W^T; x (rows, k), rows x_stride apart. false: no memory.
  bool (*product)(const float* x, int64_t x_stride, int64_t rows, const char* weight, int64_t n, int64_t k, int parts, float* y,
                  int64_t y_stride, int threads);
  // Bytes of memory, aligned to 64, that a step works in.
  int64_t (*scratch_bytes)(const DecoderModel& model, const DecoderBatch& batch, int threads);
  // The logits after each row's token, whose keys and values are added to the row's own.
  void (*step)(const DecoderModel& model, const DecoderBatch& batch, char* scratch, int threads);
};

CLP_IN_EACH_ISA(extern const DecoderKernels decoder_kernels;)

}  // namespace clp
