#include "ops.h"

#include <cstring>
#include <initializer_list>

#include "experts.h"
#include "isa.h"
#include "linear.h"
#include "token.h"

namespace moe_jax {
namespace {

template <typename T>
T* data(const Op& op, const TfLiteTensor* tensors, int input) {
  return static_cast<T*>(tensors[op.inputs[input]].data);
}

template <typename T = float>
T* result(const Op& op, const TfLiteTensor* tensors, int output = 0) {
  return static_cast<T*>(tensors[op.outputs[output]].data);
}

int last_of(const TfLiteTensor& t) { return t.dims->size ? t.dims->data[t.dims->size - 1] : 0; }

// Whether inputs and then outputs have these types.
bool typed(const Op& op, const TfLiteTensor* tensors, std::initializer_list<TfLiteType> types) {
  const TfLiteType* type = types.begin();
  for (const auto* side : {&op.inputs, &op.outputs})
    for (const int tensor : *side)
      if (tensors[tensor].type != *type++) return false;
  return true;
}

float number(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr TfLiteType kF = kTfLiteFloat32, kI = kTfLiteInt32, kBytes = kTfLiteUInt8;

// Routed experts: x [T, D], ids and weights [T, K], the bank; y [T, D]

Shape experts_shape(const Op& op) {
  return {op.options[0], op.options[1], op.options[2], op.options[3], op.options[4]};
}

const char* check_experts(const Op& op, const TfLiteTensor* t) {
  if (!typed(op, t, {kF, kI, kF, kBytes, kF}))
    return "inputs must be x float32, ids int32, weights float32 and the bank uint8, the output float32";
  const Shape s = experts_shape(op);
  if (!s.experts || !s.choices || s.choices > kMostChoices || !s.width || s.width % kBlock || !s.hidden ||
      s.hidden % kBlock)
    return "options must name experts, 1 to 64 choices, and widths that are multiples of 32";
  const TfLiteTensor &x = t[op.inputs[0]], &ids = t[op.inputs[1]], &weights = t[op.inputs[2]];
  const size_t tokens = x.bytes / 4 / s.width;
  if (last_of(x) != static_cast<int>(s.width) || t[op.outputs[0]].bytes != x.bytes || ids.bytes != weights.bytes ||
      ids.bytes != tokens * s.choices * 4)
    return "x and y must be [T, width], ids and weights [T, choices]";
  if (t[op.inputs[3]].bytes != s.experts * expert_bytes(s))
    return "the bank has another size than its options say; export the model again";
  return nullptr;
}

const char* do_experts(const Op& op, const TfLiteTensor* t, int threads) {
  const Shape s = experts_shape(op);
  const Call call = {static_cast<int>(t[op.inputs[0]].bytes / 4 / s.width),
                     data<const float>(op, t, 0),
                     data<const int32_t>(op, t, 1),
                     data<const float>(op, t, 2),
                     data<const uint8_t>(op, t, 3),
                     result(op, t)};
  return run_experts(*op.isa, s, call, threads) ? nullptr : "an id is out of range";
}

// A product: x [..., in], the weight; y [..., out]. And rows of a weight: ids [T], the weight; y [T, in]

Matrix matrix(const Op& op) { return {op.options[0], op.options[1]}; }

const char* check_matrix(const Op& op, const TfLiteTensor* t) {
  const Matrix m = matrix(op);
  if (!m.outputs || m.outputs % kColumns || !m.inputs || m.inputs % kBlock)
    return "options must name outputs, a multiple of 16, and inputs, a multiple of 32";
  if (t[op.inputs[1]].bytes != matrix_bytes(m.outputs, m.inputs))
    return "the weight has another size than its options say; export the model again";
  return nullptr;
}

const char* check_linear(const Op& op, const TfLiteTensor* t) {
  if (!typed(op, t, {kF, kBytes, kF})) return "inputs must be x float32 and the weight uint8, the output float32";
  if (const char* wrong = check_matrix(op, t)) return wrong;
  const Matrix m = matrix(op);
  const TfLiteTensor& x = t[op.inputs[0]];
  if (last_of(x) != static_cast<int>(m.inputs) || t[op.outputs[0]].bytes / m.outputs != x.bytes / m.inputs)
    return "x must be [..., inputs], y [..., outputs]";
  return nullptr;
}

const char* do_linear(const Op& op, const TfLiteTensor* t, int threads) {
  const Matrix m = matrix(op);
  run_linear(*op.isa, m, static_cast<int>(t[op.inputs[0]].bytes / 4 / m.inputs), data<const float>(op, t, 0),
             data<const uint8_t>(op, t, 1), result(op, t), threads);
  return nullptr;
}

const char* check_embedding(const Op& op, const TfLiteTensor* t) {
  if (!typed(op, t, {kI, kBytes, kF})) return "inputs must be ids int32 and the weight uint8, the output float32";
  if (const char* wrong = check_matrix(op, t)) return wrong;
  const bool fits = t[op.outputs[0]].bytes == t[op.inputs[0]].bytes * matrix(op).inputs;
  return fits ? nullptr : "ids must be [T], y [T, inputs]";
}

const char* do_embedding(const Op& op, const TfLiteTensor* t, int) {
  const bool known = run_embedding(matrix(op), static_cast<int>(t[op.inputs[0]].bytes / 4), data<const int32_t>(op, t, 0),
                                   data<const uint8_t>(op, t, 1), result(op, t));
  return known ? nullptr : "an id is out of range";
}

// The attention half of a layer for one token: x, norm [D], two weights, cosines and sines [H], mask [C], k and v
// [1, G, C, H], start [4], of which the third is the position; y like x, and k and v with the token's own.

AttentionShape attention_shape(const Op& op) {
  const auto& o = op.options;
  return {o[0], o[1], o[2], o[3], number(o[4]), number(o[5])};
}

const char* check_self_attention(const Op& op, const TfLiteTensor* t) {
  if (!typed(op, t, {kF, kF, kBytes, kBytes, kF, kF, kF, kF, kF, kI, kF, kF, kF}))
    return "inputs and outputs must be float32, but weights uint8 and the start int32";
  const AttentionShape s = attention_shape(op);
  const auto bytes = [&](int input) { return t[op.inputs[input]].bytes; };
  const size_t heads = s.heads * s.head_width, all = heads + 2 * s.groups * s.head_width;
  if (!s.width || s.width % kBlock || !heads || heads % kBlock || s.head_width % 16 || !s.groups || s.heads % s.groups)
    return "options must name a width of 32s, heads that groups divide, and a head width of 16s";
  if (bytes(2) != matrix_bytes(all, s.width) || bytes(3) != matrix_bytes(s.width, heads))
    return "a weight has another size than its options say; export the model again";
  const TfLiteTensor& k = t[op.inputs[7]];
  if (bytes(0) != 4 * s.width || bytes(1) != bytes(0) || t[op.outputs[0]].bytes != bytes(0) ||
      bytes(4) != 4 * s.head_width || bytes(5) != bytes(4) || bytes(9) != 16 || k.dims->size != 4 ||
      k.bytes != bytes(6) * s.groups * s.head_width || bytes(8) != k.bytes || t[op.outputs[1]].bytes != k.bytes ||
      t[op.outputs[2]].bytes != k.bytes)
    return "x, y and the norm must be [D], cosines and sines [H], the mask [C], k and v [1, G, C, H], the start [4]";
  return nullptr;
}

// The cache that an op writes to, which is the one it is given wherever the caller uses one for both.
float* kept(const Op& op, const TfLiteTensor* t, int input, int output) {
  const auto* from = data<const float>(op, t, input);
  auto* to = result(op, t, output);
  if (to != from) std::memcpy(to, from, t[op.inputs[input]].bytes);
  return to;
}

const char* do_self_attention(const Op& op, const TfLiteTensor* t, int threads) {
  const int length = static_cast<int>(t[op.inputs[6]].bytes / 4), position = data<const int32_t>(op, t, 9)[2];
  if (position < 0 || position >= length) return "the position is not within the cache";
  float *k = kept(op, t, 7, 1), *v = kept(op, t, 8, 2);
  const auto floats = [&](int input) { return data<const float>(op, t, input); };
  run_self_attention(*op.isa, attention_shape(op),
                     {floats(0), floats(1), data<const uint8_t>(op, t, 2), data<const uint8_t>(op, t, 3), floats(4),
                      floats(5), floats(6), k, v, position, length, result(op, t)},
                     threads);
  return nullptr;
}

// The feed-forward half of a layer for one token: x, norm [D], router [E, D], bias [E], the bank and, if `shared` is
// not 0, the expert that every token takes; y like x.

MixtureShape mixture_shape(const Op& op) {
  const auto& o = op.options;
  return {{o[0], o[1], o[2], o[3], o[4]}, {o[0], o[1], o[5], o[6], number(o[7])}, o[8], number(o[9])};
}

const char* check_mixture(const Op& op, const TfLiteTensor* t) {
  const MixtureShape m = mixture_shape(op);
  const Shape &s = m.experts, shared = {1, 1, s.width, m.shared, s.activation};
  if ((m.shared > 0) != (op.inputs.size() == 6)) return "the shared expert must be there if options name its width";
  if (!(m.shared ? typed(op, t, {kF, kF, kF, kF, kBytes, kBytes, kF}) : typed(op, t, {kF, kF, kF, kF, kBytes, kF})))
    return "inputs and outputs must be float32, the experts uint8";
  if (!s.experts || s.experts > kMostExperts || !s.choices || s.choices > s.experts || s.choices > kMostChoices ||
      !s.width || s.width % kBlock || !s.hidden || s.hidden % kBlock || m.shared % kBlock)
    return "options must name experts, no more choices than that or 64, and widths that are multiples of 32";
  const auto bytes = [&](int input) { return t[op.inputs[input]].bytes; };
  if (bytes(4) != s.experts * expert_bytes(s) || (m.shared && bytes(5) != expert_bytes(shared)))
    return "the bank has another size than its options say; export the model again";
  if (bytes(0) != 4 * s.width || bytes(1) != bytes(0) || t[op.outputs[0]].bytes != bytes(0) ||
      bytes(2) != s.experts * bytes(0) || bytes(3) != 4 * s.experts)
    return "x, y and the norm must be [D], the router [E, D], its bias [E]";
  return nullptr;
}

const char* do_mixture(const Op& op, const TfLiteTensor* t, int threads) {
  const MixtureShape s = mixture_shape(op);
  const auto floats = [&](int input) { return data<const float>(op, t, input); };
  run_mixture(*op.isa, s,
              {floats(0), floats(1), floats(2), floats(3), data<const uint8_t>(op, t, 4),
               s.shared ? data<const uint8_t>(op, t, 5) : nullptr, result(op, t)},
              threads);
  return nullptr;
}

constexpr Kind kKinds[] = {
    {"moe_jax.routed_experts", 4, 1, 5, check_experts, do_experts},
    {"moe_jax.linear", 2, 1, 2, check_linear, do_linear},
    {"moe_jax.embedding", 2, 1, 2, check_embedding, do_embedding},
    {"moe_jax.self_attention", 10, 3, 6, check_self_attention, do_self_attention},
    {"moe_jax.mixture", 6, 1, 10, check_mixture, do_mixture},
    {"moe_jax.mixture", 5, 1, 10, check_mixture, do_mixture},
};

}  // namespace

const Kind* find_kind(const TfLiteNode& node, const TfLiteRegistration& registration) {
  if (registration.builtin_code != kTfLiteBuiltinCustom || !registration.custom_name) return nullptr;
  for (const Kind& kind : kKinds) {
    if (!std::strcmp(registration.custom_name, kind.name) && node.inputs->size == kind.inputs &&
        node.outputs->size == kind.outputs && node.custom_initial_data_size == 4 * kind.options)
      return &kind;
  }
  return nullptr;
}

}  // namespace moe_jax
