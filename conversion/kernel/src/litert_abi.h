// The parts of LiteRT's C interface that the plug-in needs, declared here because no wheel carries headers.
//
// Two generations: the delegate structs of TFLite's c/common.h, whose layout has been stable for years, and
// LiteRT's accelerator definition (version 1), which is declared stable and names its own version.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

typedef enum { kTfLiteOk = 0, kTfLiteError = 1 } TfLiteStatus;
typedef enum { kTfLiteFloat32 = 1, kTfLiteInt32 = 2, kTfLiteUInt8 = 3 } TfLiteType;
constexpr int32_t kTfLiteBuiltinCustom = 32;
constexpr int64_t kTfLiteDelegateFlagsAllowDynamicTensors = 1;

struct TfLiteIntArray {
  int size;
  int data[1];
};

struct TfLiteContext;
struct TfLiteDelegate;

struct TfLiteTensor {
  int32_t type;
  void* data;
  TfLiteIntArray* dims;
  struct {
    float scale;
    int32_t zero_point;
  } params;
  int32_t allocation_type;
  size_t bytes;
  const void* allocation;
  const char* name;
  TfLiteDelegate* delegate;
  int buffer_handle;
  bool data_is_stale, is_variable;
  struct {
    int32_t type;
    void* params;
  } quantization;
  void* sparsity;
  const TfLiteIntArray* dims_signature;
};

struct TfLiteNode {
  TfLiteIntArray *inputs, *outputs, *intermediates, *temporaries;
  void *user_data, *builtin_data;
  const void* custom_initial_data;
  int custom_initial_data_size;
  TfLiteDelegate* delegate;
  bool might_have_side_effect;
};

struct TfLiteRegistration {
  void* (*init)(TfLiteContext*, const char* buffer, size_t length);
  void (*free)(TfLiteContext*, void* buffer);
  TfLiteStatus (*prepare)(TfLiteContext*, TfLiteNode*);
  TfLiteStatus (*invoke)(TfLiteContext*, TfLiteNode*);
  const char* (*profiling_string)(const TfLiteContext*, const TfLiteNode*);
  int32_t builtin_code;
  const char* custom_name;
  int version;
  void* registration_external;
  void* (*async_kernel)(TfLiteContext*, TfLiteNode*);
  uint64_t inplace_operator;
};

struct TfLiteContext {  // up to the last field in use
  size_t tensors_size;
  TfLiteStatus (*GetExecutionPlan)(TfLiteContext*, TfLiteIntArray** plan);
  TfLiteTensor* tensors;
  void* impl_;
  TfLiteStatus (*ResizeTensor)(TfLiteContext*, TfLiteTensor*, TfLiteIntArray* new_size);
  void (*ReportError)(TfLiteContext*, const char* message, ...);
  TfLiteStatus (*AddTensors)(TfLiteContext*, int count, int* first);
  TfLiteStatus (*GetNodeAndRegistration)(TfLiteContext*, int index, TfLiteNode**, TfLiteRegistration**);
  TfLiteStatus (*ReplaceNodeSubsetsWithDelegateKernels)(TfLiteContext*, TfLiteRegistration,
                                                        const TfLiteIntArray* nodes, TfLiteDelegate*);
  int recommended_num_threads;
};

struct TfLiteDelegateParams {
  TfLiteDelegate* delegate;
  TfLiteIntArray *nodes_to_replace, *input_tensors, *output_tensors;
};

struct TfLiteDelegate {
  void* data_;
  TfLiteStatus (*Prepare)(TfLiteContext*, TfLiteDelegate*);
  TfLiteStatus (*CopyFromBufferHandle)(TfLiteContext*, TfLiteDelegate*, int handle, TfLiteTensor*);
  TfLiteStatus (*CopyToBufferHandle)(TfLiteContext*, TfLiteDelegate*, int handle, TfLiteTensor*);
  void (*FreeBufferHandle)(TfLiteContext*, TfLiteDelegate*, int* handle);
  int64_t flags;
  void* opaque_delegate_builder;
};

static_assert(sizeof(void*) != 8 || sizeof(TfLiteTensor) == 112);
static_assert(sizeof(void*) != 8 || sizeof(TfLiteRegistration) == 88);

// LiteRT

typedef int LiteRtStatus;
constexpr LiteRtStatus kLiteRtStatusOk = 0, kLiteRtStatusErrorWrongVersion = 8;
constexpr int kLiteRtHwAcceleratorCpu = 1;

struct LiteRtAbiHeader {
  uint16_t struct_size, major_version, minor_version, reserved;
};

struct LiteRtApiVersion {
  int major, minor, patch;
};

struct LiteRtRuntimeContext {  // up to the last field in use
  LiteRtAbiHeader abi_header;
  void* first[9];
  LiteRtStatus (*get_opaque_options)(void* options, void** opaque);
  LiteRtStatus (*find_opaque_options_data)(void* opaque, const char* identifier, void** data);
  void* second[6];
  LiteRtStatus (*wrap_delegate)(TfLiteDelegate*, void (*deleter)(TfLiteDelegate*), void** wrapper);
};
static_assert(sizeof(void*) != 8 || offsetof(LiteRtRuntimeContext, wrap_delegate) == 144);

struct LiteRtAcceleratorDef {
  LiteRtAbiHeader abi_header;
  LiteRtStatus (*get_name)(const void* accelerator, const char** name);
  LiteRtStatus (*get_version)(const void* accelerator, LiteRtApiVersion* version);
  LiteRtStatus (*get_hardware_support)(const void* accelerator, int* hardware);
  LiteRtStatus (*is_tflite_delegate_responsible_for_jit_compilation)(const void* accelerator, bool* answer);
  LiteRtStatus (*create_delegate)(LiteRtRuntimeContext*, void* environment, const void* accelerator,
                                  void* options, void** wrapper);
  void *start_metrics_collection, *stop_metrics_collection;
  struct {
    LiteRtAbiHeader abi_header;
    void* functions[6];
    int device_tag, queue_tag;
    size_t num_supported_buffer_types;
    int supported_buffer_types[16];
  } buffer_handlers;
};
static_assert(sizeof(void*) != 8 || sizeof(LiteRtAcceleratorDef) == 200);
}
