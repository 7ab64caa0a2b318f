// What a layer does with each token by itself: rotating queries and keys, and routing.
#pragma once

#include <cstdint>

#include "isa.h"

namespace moe_jax {

// x [tokens, heads, width] to y alike; cosines and sines [tokens, width], each standing twice; see Isa::rotate.
void run_rotary(const Isa& isa, int tokens, int heads, int width, float epsilon, const float* x, const float* cosines,
                const float* sines, float* y, int threads);

// x [tokens, D], weight [E, D], bias [E] to ids and shares [tokens, K]; see Isa::route.
void run_route(const Isa& isa, const RouteShape& shape, int tokens, const float* x, const float* weight,
               const float* bias, int32_t* ids, float* shares, int threads);

}  // namespace moe_jax
