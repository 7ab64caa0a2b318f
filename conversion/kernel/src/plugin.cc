// How LiteRT comes by the kernel: a delegate that takes over the ops of ops.h.
//
// Three doors lead to it: `LiteRtAcceleratorImpl` (LiteRT and LiteRT-LM, as an accelerator for the CPU),
// `tflite_plugin_create_delegate` (TFLite's external delegates), and the bare functions, `moe_jax_experts` and others.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "isa.h"
#include "linear.h"
#include "litert_abi.h"
#include "ops.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace moe_jax {
namespace {

// The first positive one of: the environment's, the delegate's, the interpreter's.
int count_threads(const TfLiteContext* context, int delegate) {
  const char* text = std::getenv("MOE_JAX_KERNEL_THREADS");
  const int chosen = text ? std::atoi(text) : 0;
  return std::max(1, chosen > 0 ? chosen : delegate > 0 ? delegate : context->recommended_num_threads);
}

void* init(TfLiteContext* context, const char* buffer, size_t) {
  const auto* params = reinterpret_cast<const TfLiteDelegateParams*>(buffer);
  TfLiteNode* node;
  TfLiteRegistration* registration;
  if (context->GetNodeAndRegistration(context, params->nodes_to_replace->data[0], &node, &registration))
    return nullptr;
  auto* op = new (std::nothrow) Op{};
  if (!op) return nullptr;
  op->kind = find_kind(*node, *registration);
  op->isa = find_isa(std::getenv("MOE_JAX_KERNEL_ISA"));
  op->threads = static_cast<int>(reinterpret_cast<intptr_t>(params->delegate->data_));
  op->inputs.assign(node->inputs->data, node->inputs->data + node->inputs->size);
  op->outputs.assign(node->outputs->data, node->outputs->data + node->outputs->size);
  op->options.resize(node->custom_initial_data_size / 4);
  if (!op->options.empty()) std::memcpy(op->options.data(), node->custom_initial_data, 4 * op->options.size());
  return op;
}

void release(TfLiteContext*, void* op) { delete static_cast<Op*>(op); }

TfLiteStatus answer(TfLiteContext* context, const char* name, const char* wrong) {
  if (wrong) context->ReportError(context, "%s: %s", name, wrong);
  return wrong ? kTfLiteError : kTfLiteOk;
}

TfLiteStatus prepare(TfLiteContext* context, TfLiteNode* node) {
  const auto* op = static_cast<const Op*>(node->user_data);
  if (!op) return answer(context, "moe_jax", "out of memory");
  if (!op->isa) return answer(context, op->kind->name, "this processor lacks what MOE_JAX_KERNEL_ISA names");
  return answer(context, op->kind->name, op->kind->check(*op, context->tensors));
}

TfLiteStatus invoke(TfLiteContext* context, TfLiteNode* node) {
  const auto* op = static_cast<const Op*>(node->user_data);
  const int threads = count_threads(context, op->threads);
  return answer(context, op->kind->name, op->kind->run(*op, context->tensors, threads));
}

TfLiteStatus take_over(TfLiteContext* context, TfLiteDelegate* delegate) {
  TfLiteIntArray* plan;
  if (context->GetExecutionPlan(context, &plan)) return kTfLiteError;
  const std::vector<int> nodes(plan->data, plan->data + plan->size);  // the plan changes under the loop
  for (const int index : nodes) {
    TfLiteNode* node;
    TfLiteRegistration* registration;
    if (context->GetNodeAndRegistration(context, index, &node, &registration)) return kTfLiteError;
    const Kind* kind = find_kind(*node, *registration);
    if (!kind) continue;
    TfLiteRegistration ours = {};
    ours.init = init, ours.free = release, ours.prepare = prepare, ours.invoke = invoke;
    ours.custom_name = kind->name, ours.version = 1;
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
  *name = "moe_jax";
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

// The functions without a runtime: 0, 1 if an id is out of range, 2 if this processor has no path called `isa` (NULL
// for the best one). Other arguments as in their headers.
EXPORT int moe_jax_experts(const char* isa, int threads, const moe_jax::Shape* shape, const moe_jax::Call* call) {
  const moe_jax::Isa* found = moe_jax::find_isa(isa);
  if (!found) return 2;
  return moe_jax::run_experts(*found, *shape, *call, threads) ? 0 : 1;
}

EXPORT int moe_jax_linear(const char* isa, int threads, const moe_jax::Matrix* shape, int tokens, const float* x,
                          const uint8_t* weights, float* y) {
  const moe_jax::Isa* found = moe_jax::find_isa(isa);
  if (!found) return 2;
  moe_jax::run_linear(*found, *shape, tokens, x, weights, y, threads);
  return 0;
}

EXPORT int moe_jax_attention(const char* isa, int threads, const moe_jax::AttentionCall* call) {
  const moe_jax::Isa* found = moe_jax::find_isa(isa);
  if (!found) return 2;
  moe_jax::run_attention(*found, *call, threads);
  return 0;
}
