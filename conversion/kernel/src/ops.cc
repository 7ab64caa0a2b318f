#include "ops.h"

#include <cstring>
#include <initializer_list>

#include "attention.h"
#include "experts.h"
#include "isa.h"
#include "linear.h"
#include "per_token.h"

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
  if (!s.experts || !s.choices || s.choices > 64 || !s.width || s.width % kBlock || !s.hidden || s.hidden % kBlock)
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

// Attention: q [1, G, R, H], k and v [1, G, C, H], mask [1, 1, S, C], used []; y like q

const char* check_attention(const Op& op, const TfLiteTensor* t) {
  if (!typed(op, t, {kF, kF, kF, kF, kI, kF}))
    return "inputs must be q, k, v and the mask float32 and the positions in use int32, the output float32";
  const TfLiteTensor &q = t[op.inputs[0]], &k = t[op.inputs[1]], &v = t[op.inputs[2]], &mask = t[op.inputs[3]];
  for (const TfLiteTensor* each : {&q, &k, &v, &mask})
    if (each->dims->size != 4) return "q, k, v and the mask must have four axes";
  const int *dq = q.dims->data, *dk = k.dims->data, *dm = mask.dims->data;
  if (dq[0] != 1 || dk[0] != 1 || dq[1] != dk[1] || dq[3] != dk[3] || dq[3] % 16 || k.bytes != v.bytes ||
      dm[3] != dk[2] || !dm[2] || dq[2] % dm[2] || t[op.outputs[0]].bytes != q.bytes || t[op.inputs[4]].bytes != 4)
    return "q and y must be [1, G, R, H], k and v [1, G, C, H], the mask [1, 1, S, C], H a multiple of 16 and R of S";
  return nullptr;
}

const char* do_attention(const Op& op, const TfLiteTensor* t, int threads) {
  const int *dq = t[op.inputs[0]].dims->data, *dm = t[op.inputs[3]].dims->data, used = *data<const int32_t>(op, t, 4);
  if (used < 1 || used > dm[3]) return "positions are not within the cache";
  run_attention(*op.isa,
                {dq[1], dq[2], dm[2], dq[3], dm[3], used, data<const float>(op, t, 0), data<const float>(op, t, 1),
                 data<const float>(op, t, 2), data<const float>(op, t, 3), result(op, t)},
                threads);
  return nullptr;
}

// Rotation: x [1, T, heads, H], cosines and sines [T, 1, H]; y like x

const char* check_rotary(const Op& op, const TfLiteTensor* t) {
  if (!typed(op, t, {kF, kF, kF, kF})) return "inputs and output must be float32";
  const TfLiteTensor &x = t[op.inputs[0]], &cosines = t[op.inputs[1]];
  if (x.dims->size != 4 || last_of(x) % 16 || last_of(cosines) != last_of(x) || t[op.outputs[0]].bytes != x.bytes ||
      cosines.bytes != t[op.inputs[2]].bytes || cosines.bytes * x.dims->data[2] != x.bytes)
    return "x and y must be [1, T, heads, H], cosines and sines [T, 1, H], H a multiple of 16";
  return nullptr;
}

const char* do_rotary(const Op& op, const TfLiteTensor* t, int threads) {
  const int* d = t[op.inputs[0]].dims->data;
  run_rotary(*op.isa, d[1], d[2], d[3], number(op.options[0]), data<const float>(op, t, 0), data<const float>(op, t, 1),
             data<const float>(op, t, 2), result(op, t), threads);
  return nullptr;
}

// Routing: x [T, D], the router [E, D], a bias [E]; ids and shares [T, K]

RouteShape route_shape(const Op& op) {
  const auto& o = op.options;
  return {o[0], o[1], o[2], o[3], o[4], number(o[5])};
}

const char* check_route(const Op& op, const TfLiteTensor* t) {
  if (!typed(op, t, {kF, kF, kF, kI, kF})) return "inputs must be float32, outputs ids int32 and shares float32";
  const RouteShape s = route_shape(op);
  if (!s.width || s.width % 16 || !s.choices || s.choices > s.experts || s.experts > kMostExperts)
    return "options must name a width that is a multiple of 16, and no more choices than experts";
  const TfLiteTensor &x = t[op.inputs[0]], &ids = t[op.outputs[0]];
  const size_t tokens = x.bytes / 4 / s.width;
  if (last_of(x) != static_cast<int>(s.width) || t[op.inputs[1]].bytes != 4ull * s.experts * s.width ||
      t[op.inputs[2]].bytes != 4ull * s.experts || ids.bytes != 4 * tokens * s.choices ||
      t[op.outputs[1]].bytes != ids.bytes)
    return "x must be [T, D], the router [E, D], its bias [E], ids and shares [T, K]";
  return nullptr;
}

const char* do_route(const Op& op, const TfLiteTensor* t, int threads) {
  const RouteShape s = route_shape(op);
  run_route(*op.isa, s, static_cast<int>(t[op.inputs[0]].bytes / 4 / s.width), data<const float>(op, t, 0),
            data<const float>(op, t, 1), data<const float>(op, t, 2), result<int32_t>(op, t), result(op, t, 1), threads);
  return nullptr;
}

constexpr Kind kKinds[] = {
    {"moe_jax.routed_experts", 4, 1, 5, check_experts, do_experts},
    {"moe_jax.linear", 2, 1, 2, check_linear, do_linear},
    {"moe_jax.embedding", 2, 1, 2, check_embedding, do_embedding},
    {"moe_jax.attention", 5, 1, 0, check_attention, do_attention},
    {"moe_jax.rotary", 3, 1, 1, check_rotary, do_rotary},
    {"moe_jax.route", 3, 2, 6, check_route, do_route},
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
