// Attention of one token over a cache of float32 that is read where it lies, and only as far as it is in use.
//
// C cache length, G key/value heads, H head width, R query heads of a group.
#pragma once

#include <cstddef>

namespace moe_jax {

struct AttentionCall {
  int groups, rows, width, length;  // G, R, H (a multiple of 16), C
  int used;                         // positions of the cache to look at, from the first on
  const float *q, *k, *v;           // [G, R, H], [G, C, H], [G, C, H]
  const float* mask;                // [C], added to the scores
  float* out;                       // [G, R, H]
};

struct Isa;

// softmax(q k^T + mask) v. The result does not depend on the number of threads.
void run_attention(const Isa& isa, const AttentionCall& call, int threads);

}  // namespace moe_jax
