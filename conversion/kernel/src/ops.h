// The ops that a .tflite may ask for, each from its tensors to the function that does it.
#pragma once

#include <cstdint>
#include <vector>

#include "litert_abi.h"

namespace moe_jax {

struct Isa;
struct Kind;

// One op of a graph.
struct Op {
  const Kind* kind;
  const Isa* isa;
  int threads;  // as the delegate was told, or 0
  std::vector<int> inputs, outputs;
  std::vector<uint32_t> options;
};

// What is known of all ops of a name; the functions answer with what is wrong, or nullptr.
struct Kind {
  const char* name;
  int inputs, outputs, options;  // how many
  const char* (*check)(const Op&, const TfLiteTensor* tensors);
  const char* (*run)(const Op&, const TfLiteTensor* tensors, int threads);
};

// The kind of this op, or nullptr where it is none of ours.
const Kind* find_kind(const TfLiteNode& node, const TfLiteRegistration& registration);

}  // namespace moe_jax
