// How LiteRT comes by the kernel: a delegate that takes over the op `moe_jax.routed_experts`.
//
// Three doors lead to it: `LiteRtAcceleratorImpl` (LiteRT and LiteRT-LM, as an accelerator for the CPU),
// `tflite_plugin_create_delegate` (TFLite's external delegates), and `moe_jax_experts`, the bare function.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "experts.h"
#include "isa.h"
#include "litert_abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace moe_jax {
namespace {

constexpr char kName[] = "moe_jax.routed_experts";

// The first positive one of: the environment's, the delegate's, the interpreter's.
int count_threads(const TfLiteContext* context, int delegate) {
  const char* text = std::getenv("MOE_JAX_KERNEL_THREADS");
  const int chosen = text ? std::atoi(text) : 0;
  return std::max(1, chosen > 0 ? chosen : delegate > 0 ? delegate : context->recommended_num_threads);
}

// One op of the graph: inputs x, ids, weights, bank; output y.
struct Op {
  const Isa* isa;
  Shape shape;
  int x, ids, weights, bank, y, threads;
};

bool is_ours(TfLiteNode* node, TfLiteRegistration* op) {
  return op->builtin_code == kTfLiteBuiltinCustom && op->custom_name && !std::strcmp(op->custom_name, kName) &&
         node->inputs->size == 4 && node->outputs->size == 1 && node->custom_initial_data_size == sizeof(Shape);
}

void* init(TfLiteContext* context, const char* buffer, size_t) {
  const auto* params = reinterpret_cast<const TfLiteDelegateParams*>(buffer);
  TfLiteNode* node;
  TfLiteRegistration* registration;
  if (context->GetNodeAndRegistration(context, params->nodes_to_replace->data[0], &node, &registration))
    return nullptr;
  auto* op = new (std::nothrow) Op{};
  if (!op) return nullptr;
  const int* in = node->inputs->data;
  op->x = in[0], op->ids = in[1], op->weights = in[2], op->bank = in[3], op->y = node->outputs->data[0];
  std::memcpy(&op->shape, node->custom_initial_data, sizeof(Shape));
  op->isa = find_isa(std::getenv("MOE_JAX_KERNEL_ISA"));
  op->threads = static_cast<int>(reinterpret_cast<intptr_t>(params->delegate->data_));
  return op;
}

void release(TfLiteContext*, void* op) { delete static_cast<Op*>(op); }

size_t last_of(const TfLiteTensor& t) { return t.dims->size ? t.dims->data[t.dims->size - 1] : 0; }

TfLiteStatus refuse(TfLiteContext* context, const char* why) {
  context->ReportError(context, "%s: %s", kName, why);
  return kTfLiteError;
}

TfLiteStatus prepare(TfLiteContext* context, TfLiteNode* node) {
  const auto* op = static_cast<const Op*>(node->user_data);
  if (!op) return refuse(context, "out of memory");
  if (!op->isa) return refuse(context, "this processor lacks what MOE_JAX_KERNEL_ISA names");
  const TfLiteTensor *t = context->tensors, &x = t[op->x], &ids = t[op->ids], &w = t[op->weights], &y = t[op->y];
  const Shape& s = op->shape;
  if (x.type != kTfLiteFloat32 || ids.type != kTfLiteInt32 || w.type != kTfLiteFloat32 || y.type != kTfLiteFloat32)
    return refuse(context, "inputs must be x float32, ids int32, weights float32 and the bank, output float32");
  if (!s.experts || !s.choices || s.choices > 64 || !s.width || s.width % kBlock || !s.hidden || s.hidden % kBlock)
    return refuse(context, "options must name experts, 1 to 64 choices, and widths that are multiples of 32");
  const size_t tokens = x.bytes / 4 / s.width;
  if (last_of(x) != s.width || y.bytes != x.bytes || last_of(ids) != s.choices || ids.bytes != w.bytes ||
      ids.bytes != tokens * s.choices * 4)
    return refuse(context, "x and y must be [T, width], ids and weights [T, choices]");
  if (t[op->bank].bytes != s.experts * expert_bytes(s))
    return refuse(context, "the bank has another size than its options say; export the model again");
  return kTfLiteOk;
}

TfLiteStatus invoke(TfLiteContext* context, TfLiteNode* node) {
  const auto* op = static_cast<const Op*>(node->user_data);
  const TfLiteTensor* t = context->tensors;
  const Call call = {static_cast<int>(t[op->x].bytes / 4 / op->shape.width),
                     static_cast<const float*>(t[op->x].data),
                     static_cast<const int32_t*>(t[op->ids].data),
                     static_cast<const float*>(t[op->weights].data),
                     static_cast<const uint8_t*>(t[op->bank].data),
                     static_cast<float*>(t[op->y].data)};
  if (run_experts(*op->isa, op->shape, call, count_threads(context, op->threads))) return kTfLiteOk;
  return refuse(context, "an id is out of range");
}

TfLiteStatus take_over(TfLiteContext* context, TfLiteDelegate* delegate) {
  TfLiteIntArray* plan;
  if (context->GetExecutionPlan(context, &plan)) return kTfLiteError;
  const std::vector<int> nodes(plan->data, plan->data + plan->size);  // the plan changes under the loop
  TfLiteRegistration ours = {};
  ours.init = init, ours.free = release, ours.prepare = prepare, ours.invoke = invoke;
  ours.custom_name = kName, ours.version = 1;
  for (const int index : nodes) {
    TfLiteNode* node;
    TfLiteRegistration* registration;
    if (context->GetNodeAndRegistration(context, index, &node, &registration)) return kTfLiteError;
    if (!is_ours(node, registration)) continue;
    const TfLiteIntArray one = {1, {index}};
    if (context->ReplaceNodeSubsetsWithDelegateKernels(context, ours, &one, delegate)) return kTfLiteError;
  }
  return kTfLiteOk;
}

TfLiteDelegate* make_delegate(int threads) {
  auto* delegate = new (std::nothrow) TfLiteDelegate{};
  if (!delegate) return nullptr;
  delegate->data_ = reinterpret_cast<void*>(static_cast<intptr_t>(threads));
  delegate->Prepare = take_over;
  // Else the runtime would prepare the graph before the op has an implementation.
  delegate->flags = kTfLiteDelegateFlagsAllowDynamicTensors;
  return delegate;
}

LiteRtStatus get_name(const void*, const char** name) {
  *name = "moe_jax routed experts";
  return kLiteRtStatusOk;
}

LiteRtStatus get_version(const void*, LiteRtApiVersion* version) {
  *version = {1, 0, 0};
  return kLiteRtStatusOk;
}

LiteRtStatus get_hardware_support(const void*, int* hardware) {
  *hardware = kLiteRtHwAcceleratorCpu;
  return kLiteRtStatusOk;
}

LiteRtStatus compiles_when_asked(const void*, bool* answer) {
  *answer = true;
  return kLiteRtStatusOk;
}

// The threads that XNNPACK is told to use; its options travel as lines of `name = value`.
int threads_of(const LiteRtRuntimeContext* runtime, void* options) {
  constexpr char kKey[] = "num_threads = ";
  void *opaque, *data = nullptr;
  if (runtime->get_opaque_options(options, &opaque)) return 0;
  if (runtime->find_opaque_options_data(opaque, "xnnpack", &data) || !data) return 0;
  const char* found = std::strstr(static_cast<const char*>(data), kKey);
  return found ? std::atoi(found + sizeof(kKey) - 1) : 0;
}

LiteRtStatus create_delegate(LiteRtRuntimeContext* runtime, void*, const void*, void* options, void** wrapper) {
  if (runtime->abi_header.major_version != 1) return kLiteRtStatusErrorWrongVersion;
  TfLiteDelegate* delegate = make_delegate(threads_of(runtime, options));
  return runtime->wrap_delegate(delegate, [](TfLiteDelegate* d) { delete d; }, wrapper);
}

}  // namespace
}  // namespace moe_jax

EXPORT const LiteRtAcceleratorDef LiteRtAcceleratorImpl;
const LiteRtAcceleratorDef LiteRtAcceleratorImpl = {
    {sizeof(LiteRtAcceleratorDef), 1, 0, 0},
    moe_jax::get_name,
    moe_jax::get_version,
    moe_jax::get_hardware_support,
    moe_jax::compiles_when_asked,
    moe_jax::create_delegate,
    nullptr,
    nullptr,
    {}};

EXPORT TfLiteDelegate* tflite_plugin_create_delegate(char**, char**, size_t, void (*)(const char*)) {
  return moe_jax::make_delegate(0);
}

EXPORT void tflite_plugin_destroy_delegate(TfLiteDelegate* delegate) { delete delegate; }

// The layer without a runtime: 0, 1 if an id is out of range, 2 if this processor has no path called `isa`
// (NULL for the best one). Arguments as in `Shape` and `Call`.
EXPORT int moe_jax_experts(const char* isa, int threads, const moe_jax::Shape* shape, const moe_jax::Call* call) {
  const moe_jax::Isa* found = moe_jax::find_isa(isa);
  if (!found) return 2;
  return moe_jax::run_experts(*found, *shape, *call, threads) ? 0 : 1;
}
