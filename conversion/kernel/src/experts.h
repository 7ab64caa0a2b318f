// One layer's routed experts: y[t] = sum over k of weights[t, k] * expert_{ids[t, k]}(x[t]).
//
// T tokens, D model, F expert width, E experts, K choices a token. An expert is down(act(gate x) * up x), with
// INT4 weights read where the file is mapped; each product rounds its input rows to INT8, as XNNPACK does.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace moe_jax {

struct Shape {
  uint32_t experts, choices, width, hidden;  // E, K, D, F
  uint32_t activation;                       // an `Activation`
};

struct Call {
  int tokens;
  const float* x;        // [T, D]
  const int32_t* ids;    // [T, K], each in [0, E)
  const float* weights;  // [T, K]
  const uint8_t* bank;   // [E, expert_bytes]; see conversion/litert/bank.py for the layout
  float* y;              // [T, D]
};

inline size_t expert_bytes(const Shape& s) {
  return matrix_bytes(2 * s.hidden, s.width) + matrix_bytes(s.width, s.hidden);
}

struct Isa;
struct Rows;

// In how many runs of columns threads take a product of which `count` are multiplied at once.
inline int column_runs(int threads, int count, int groups) { return std::min(8 * threads / count + 1, groups); }

// Columns 16 g to 16 (g + n) of h = act(gate x) * up x for each row x, to `to` (of the row's column 0), rows `stride`
// apart. `scratch` holds 2 * 16 n floats for each row.
void gate_up(const Isa& isa, const uint8_t* expert, int width, int hidden, uint32_t activation, const Rows& rows, int g,
             int n, float* scratch, float* to, size_t stride);

// False if an id is out of range; then y is not written.
bool run_experts(const Isa& isa, const Shape& shape, const Call& call, int threads);

}  // namespace moe_jax
