#include <pybind11/pybind11.h>

#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace py = pybind11;

namespace clp {
namespace {

template <class T>
T* at(const py::handle& address) { return reinterpret_cast<T*>(address.cast<uintptr_t>()); }

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// (layers, address of their packed A, rank of it), a layer being (weight, bias, n, k, parts, packed B, gate, rank).
DecoderInput input(const py::handle& given) {
  const py::tuple x = py::cast<py::tuple>(given);
  DecoderInput result;
  for (const py::handle& item : x[0]) {
    if (result.count == 3) throw py::value_error("Decoder: an input has more than three layers");
    const py::tuple l = py::cast<py::tuple>(item);
    DecoderLinear& to = result.linears[result.count++];
    to.weight = at<char>(l[0]), to.bias = at<float>(l[1]), to.n = l[2].cast<int64_t>(), to.k = l[3].cast<int64_t>();
    to.parts = l[4].cast<int>(), to.lora_b = at<char>(l[5]), to.gate = at<float>(l[6]), to.rank = l[7].cast<int64_t>();
  }
  result.lora_a = at<char>(x[1]), result.rank = x[2].cast<int64_t>();
  return result;
}

// A model's addresses and the kernels its weights were packed for. Whoever makes it keeps the tensors.
class Decoder {
 public:
  explicit Decoder(const py::dict& m) : kernels_(table().decoder) {
    const auto size = [&](const char* name) { return m[name].cast<int64_t>(); };
    const auto number = [&](const char* name) { return m[name].cast<float>(); };
    model_.hidden = size("hidden"), model_.heads = size("heads"), model_.kv_heads = size("kv_heads");
    model_.width = size("head_dim"), model_.rotary = size("rotary"), model_.intermediate = size("intermediate");
    model_.vocab = size("vocab"), model_.activation = Activation(m["activation"].cast<int>());
    model_.whole_qk_norm = m["whole_qk_norm"].cast<bool>();
    model_.eps = number("eps"), model_.embedding_scale = number("embedding_scale");
    model_.residual_scale = number("residual_scale"), model_.attention_scale = number("attention_scale");
    model_.attention_softcap = number("attention_softcap");
    model_.logit_scale = number("logit_scale"), model_.logit_softcap = number("logit_softcap");
    model_.embedding = at<float>(m["embedding"]), model_.norm = at<float>(m["norm"]);
    model_.head = input(m["head"]);
    for (const py::handle& item : m["layers"]) {
      const py::tuple l = py::cast<py::tuple>(item);
      DecoderLayer to;
      to.norm_attention = at<float>(l[0]), to.norm_attended = at<float>(l[1]);
      to.norm_mlp = at<float>(l[2]), to.norm_out = at<float>(l[3]);
      to.q_norm = at<float>(l[4]), to.k_norm = at<float>(l[5]);
      to.qkv = input(l[6]), to.output = input(l[7]), to.gate_up = input(l[8]), to.down = input(l[9]);
      to.cos = at<float>(l[10]), to.sin = at<float>(l[11]), to.window = l[12].cast<int64_t>();
      layers_.push_back(to);
    }
    model_.layers = layers_.data(), model_.layer_count = static_cast<int64_t>(layers_.size());
  }
  Decoder(const Decoder&) = delete;
  ~Decoder() { std::free(scratch_); }

  void step(int64_t rows, uintptr_t tokens, uintptr_t prompt, uintptr_t slot, uintptr_t filled, uintptr_t length,
            uintptr_t prompt_keys, uintptr_t prompt_values, uintptr_t keys, uintptr_t values, int64_t room, uintptr_t logits,
            int64_t logit_stride, int threads) {
    DecoderBatch b;
    b.rows = rows, b.room = room, b.tokens = at<int64_t>(tokens), b.prompt = at<int64_t>(prompt), b.slot = at<int64_t>(slot);
    b.filled = at<int64_t>(filled), b.length = at<int64_t>(length);
    b.prompt_keys = at<int64_t>(prompt_keys), b.prompt_values = at<int64_t>(prompt_values);
    b.keys = at<float>(keys), b.values = at<float>(values);
    b.logits = at<float>(logits), b.logit_stride = logit_stride;
    check(b);
    reserve(b, threads);
    py::gil_scoped_release release;
    kernels_.step(model_, b, scratch_, threads);
  }

  // Draws from the logits that are there and goes on, token by token, until `leave` rows have ended, or all; returns how many rows
  // are left. Their arrays (prompt, slot, filled, place, last) then hold the rows that are left, in order, and `logits` theirs.
  int64_t write(const py::dict& g, int64_t rows, int64_t leave, int threads) {
    DecoderBatch b;
    std::vector<int64_t> tokens(rows), seeds(rows);
    std::vector<float> logprob(rows);
    auto* prompt = at<int64_t>(g["prompt"]);
    auto *slot = at<int64_t>(g["slot"]), *filled = at<int64_t>(g["filled"]);
    auto *place = at<int64_t>(g["place"]), *last = at<int64_t>(g["last"]);
    const auto* all_seeds = at<int64_t>(g["seeds"]);
    auto* all_tokens = at<int64_t>(g["tokens"]);
    auto* all_logprobs = at<float>(g["logprobs"]);
    auto *valid = at<bool>(g["valid"]), *ended = at<bool>(g["ended"]);
    const auto* stops = at<int64_t>(g["stop_ids"]);
    const auto stop_count = g["stop_count"].cast<int64_t>();
    b.room = g["room"].cast<int64_t>(), b.tokens = tokens.data(), b.prompt = prompt, b.slot = slot, b.filled = filled;
    b.length = at<int64_t>(g["length"]);
    b.prompt_keys = at<int64_t>(g["prompt_keys"]), b.prompt_values = at<int64_t>(g["prompt_values"]);
    b.keys = at<float>(g["keys"]), b.values = at<float>(g["values"]);
    b.logits = at<float>(g["logits"]), b.logit_stride = g["logit_stride"].cast<int64_t>();
    SampleCall draw{b.logits, DType::f32, rows, model_.vocab, b.logit_stride, nullptr, seeds.data(),
                    {nullptr, g["temperature"].cast<float>()}, {nullptr, g["top_k"].cast<int64_t>()},
                    {nullptr, g["top_p"].cast<float>()}, {nullptr, g["min_p"].cast<float>()}, tokens.data(), logprob.data()};
    const auto sample = table().sampling.sample;
    py::gil_scoped_release release;
    for (int64_t gone = 0; rows > 0;) {
      for (int64_t i = 0; i < rows; ++i) seeds[i] = all_seeds[place[i]];
      draw.rows = rows;
      const int64_t bad = sample(draw, threads);
      if (bad >= 0) {
        py::gil_scoped_acquire acquire;
        throw py::value_error("sampling: the largest logit of row " + std::to_string(bad) +
                              " is not finite; the weights or a blend are NaN or too large");
      }
      int64_t kept = 0;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t here = place[i];
        all_tokens[here] = tokens[i], all_logprobs[here] = logprob[i], valid[here] = true;
        for (int64_t s = 0; s < stop_count; ++s) ended[here] = ended[here] || tokens[i] == stops[s];
        if (ended[here] || here == last[i]) continue;
        tokens[kept] = tokens[i], prompt[kept] = prompt[i], slot[kept] = slot[i], filled[kept] = filled[i];
        place[kept] = here + 1, last[kept] = last[i], ++kept;
      }
      gone += rows - kept, rows = kept;
      if (rows == 0) break;
      b.rows = rows;
      {
        py::gil_scoped_acquire acquire;  // for an interrupt, too
        if (PyErr_CheckSignals()) throw py::error_already_set();
        check(b);
        reserve(b, threads);
      }
      kernels_.step(model_, b, scratch_, threads);
      for (int64_t i = 0; i < rows; ++i) ++filled[i];
      if (leave && gone >= leave) break;
    }
    return rows;
  }

 private:
  void check(const DecoderBatch& b) const {
    for (int64_t i = 0; i < b.rows; ++i) {
      if (b.tokens[i] < 0 || b.tokens[i] >= model_.vocab)
        throw py::index_error("tokens[" + std::to_string(i) + "] is " + std::to_string(b.tokens[i]) + "; expected 0 <= token < " +
                              std::to_string(model_.vocab));
      if (b.filled[i] >= b.room)
        throw py::index_error("row " + std::to_string(i) + " has " + std::to_string(b.filled[i]) +
                              " tokens, and there is room for no more");
    }
  }

  void reserve(const DecoderBatch& b, int threads) {
    const int64_t bytes = kernels_.scratch_bytes(model_, b, threads);
    if (bytes <= scratch_bytes_) return;
    std::free(scratch_);
    scratch_bytes_ = 0;
    if (!(scratch_ = static_cast<char*>(std::aligned_alloc(64, bytes)))) throw std::bad_alloc();
    scratch_bytes_ = bytes;
  }

  char* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
  const DecoderKernels kernels_;
  DecoderModel model_;
  std::vector<DecoderLayer> layers_;
};

int64_t packed_bytes(int64_t n, int64_t k, int parts) { return table().decoder.packed_bytes(n, k, parts); }

void pack(uintptr_t weight, int64_t row_stride, int64_t depth_stride, int64_t n, int64_t k, int parts, uintptr_t packed, int threads) {
  table().decoder.pack(at<float>(weight), row_stride, depth_stride, n, k, parts, at<char>(packed), threads);
}

void product(uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t weight, int64_t n, int64_t k, int parts, uintptr_t y,
             int64_t y_stride, int threads) {
  if (!table().decoder.product(at<float>(x), x_stride, rows, at<char>(weight), n, k, parts, at<float>(y), y_stride, threads))
    throw std::bad_alloc();
}

}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<Decoder>(m, "Decoder")
      .def(py::init<const py::dict&>())
      .def("step", &Decoder::step)
      .def("write", &Decoder::write);
  m.def("packs_parts", [] { return table().decoder.has_parts; }, "whether packed weights are bfloat16 parts");
  m.def("packed_bytes", &packed_bytes);
  m.def("pack_weight", &pack, py::call_guard<py::gil_scoped_release>());
  m.def("packed_product", &product, py::call_guard<py::gil_scoped_release>());
}

}  // namespace clp
