// y[t] = x[t] times an INT4 weight whose rows lie as layout.h says, and rows of such a weight as floats.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace moe_jax {

struct Matrix {
  uint32_t outputs, inputs;  // multiples of 16 and of 32
};

struct Isa;

// x [tokens, inputs] to y [tokens, outputs]; each row of x is rounded to INT8.
void run_linear(const Isa& isa, const Matrix& shape, int tokens, const float* x, const uint8_t* weights, float* y,
                int threads);

// Rows `ids` [tokens] of the weight as y [tokens, inputs]; false if an id is out of range.
bool run_embedding(const Matrix& shape, int tokens, const int32_t* ids, const uint8_t* weights, float* y);

}  // namespace moe_jax
