#include "per_token.h"

#include "pool.h"

namespace moe_jax {

void run_rotary(const Isa& isa, int tokens, int heads, int width, float epsilon, const float* x, const float* cosines,
                const float* sines, float* y, int threads) {
  Pool::instance().run_in_runs(tokens, threads, [&](int t) {
    const size_t turn = static_cast<size_t>(t) * width;
    for (int head = 0; head < heads; head++) {
      const size_t at = (static_cast<size_t>(t) * heads + head) * width;
      isa.rotate(x + at, cosines + turn, sines + turn, width, epsilon, y + at);
    }
  });
}

void run_route(const Isa& isa, const RouteShape& shape, int tokens, const float* x, const float* weight,
               const float* bias, int32_t* ids, float* shares, int threads) {
  Pool::instance().run_in_runs(tokens, threads, [&](int t) {
    const size_t at = static_cast<size_t>(t);
    isa.route(shape, x + at * shape.width, weight, bias, ids + at * shape.choices, shares + at * shape.choices);
  });
}

}  // namespace moe_jax
