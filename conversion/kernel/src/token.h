// The two halves of a decoder layer for one token, each a single op: few regions of the pool, no op in between.
//
// D model, N query heads, G key/value heads, H head width, C cache length; E, K, F as in experts.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "experts.h"
#include "isa.h"

namespace moe_jax {

struct AttentionShape {
  uint32_t width, heads, groups, head_width;  // D, N, G, H
  float epsilon, head_epsilon;                // of the norm before, and of queries' and keys' (0: none)
};

struct SelfAttention {
  const float *x, *norm;         // [D], [D]
  const uint8_t *qkv, *out;      // INT4 weights [(N + 2 G) H, D] and [D, N H]; see layout.h
  const float *cosines, *sines;  // [H], each standing twice
  const float* mask;             // [C], added to the scores
  float *k, *v;                  // [G, C, H], written at `position`
  int position, length;          // below C, and C
  float* y;                      // [D]
};

// y = x + what the token sees of the cache, itself included.
void run_self_attention(const Isa& isa, const AttentionShape& shape, const SelfAttention& call, int threads);

struct MixtureShape {
  Shape experts;
  RouteShape route;
  uint32_t shared;  // hidden width of the expert that every token takes, or 0
  float epsilon;    // of the norm before
};

struct Mixture {
  const float *x, *norm;         // [D], [D]
  const float *router, *bias;    // [E, D], [E]
  const uint8_t *bank, *shared;  // [E, expert_bytes], and one expert, or nullptr
  float* y;                      // [D]
};

// y = x + what the chosen experts and the shared one make of it.
void run_mixture(const Isa& isa, const MixtureShape& shape, const Mixture& call, int threads);

}  // namespace moe_jax
