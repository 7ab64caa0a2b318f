// Work on one row at a time: rounding, the gate, sums over choices, rotation, routing.
#pragma once

#include "isa.h"
#include "vectors.h"

namespace moe_jax {
namespace {

template <int N>
struct RowWork {
  using E = Elements<N>;
  using F = typename E::F;
  using I = typename E::I;
  using B = typename E::B;

  // XNNPACK's dynamic quantisation of a row (n a multiple of 16): asymmetric, zero always representable.
  static MOE_JAX_INLINE void quantize(const float* x, int n, uint8_t* codes, float* zero, float* inverse) {
    F low = E::splat(0), high = E::splat(0);
    for (int i = 0; i < n; i += N) {
      const F v = E::load(x + i);
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    float least = 0, most = 0;
    for (int i = 0; i < N; i++) {
      least = low[i] < least ? low[i] : least;
      most = high[i] > most ? high[i] : most;
    }
    const float scale = least == most ? 1.0f : 255.0f / (most - least);
    const float below = least * scale, above = most * scale;
    float point = (-128.0f + below) + (127.0f + above) > 0 ? -128.0f - below : 127.0f - above;
    point = std::nearbyint(std::fmin(std::fmax(point, -128.0f), 127.0f));
    const I shift = I{} + (static_cast<int32_t>(point) + kOffset);
    const I floor = I{} + (kOffset - 128), ceiling = I{} + (kOffset + 127);
    for (int i = 0; i < n; i += N) {
      I q = E::magic_bits(E::load(x + i) * E::splat(scale) + E::splat(E::kMagic)) + shift;
      q = q < floor ? floor : q;
      q = q > ceiling ? ceiling : q;
      const B bytes = __builtin_convertvector(q, B);
      std::memcpy(codes + i, &bytes, sizeof bytes);
    }
    *zero = 16.0f * (point + kOffset);
    *inverse = 1.0f / scale * 0.0625f;
  }

  static MOE_JAX_INLINE void gate(const float* gate, const float* up, int n, uint32_t activation, float* h) {
    for (int i = 0; i < n; i += N) {
      const F g = E::load(gate + i);
      // tanh(z) = 2 E::sigmoid(2z) - 1, so both activations are g times a sigmoid.
      const F bent = (g * g * E::splat(0.044715f) + E::splat(1.0f)) * g * E::splat(1.59576912f);
      const F y = g * E::sigmoid(activation == kGeluTanh ? bent : g) * E::load(up + i);
      E::store(h + i, y);
    }
  }

  static MOE_JAX_INLINE void combine(const float* const* terms, const float* weights, int count, int n, float* y) {
    for (int i = 0; i < n; i += N) {
      F sum = E::load(terms[0] + i) * E::splat(weights[0]);
      for (int k = 1; k < count; k++) sum += E::load(terms[k] + i) * E::splat(weights[k]);
      E::store(y + i, sum);
    }
  }

  // A row over its root mean square, times `weight`.
  static MOE_JAX_INLINE void norm(const float* x, const float* weight, int n, float epsilon, float* y) {
    const F inverse = E::splat(1.0f / std::sqrt(E::dot(x, x, n) / n + epsilon));
    for (int i = 0; i < n; i += N) E::store(y + i, E::load(x + i) * inverse * E::load(weight + i));
  }

  // One head's row: normed if `epsilon` is not 0, then its adjacent pairs turned.
  static MOE_JAX_INLINE void rotate(const float* x, const float* cosines, const float* sines, int n, float epsilon,
                                    float* y) {
    const float inverse = epsilon ? 1.0f / std::sqrt(E::dot(x, x, n) / n + epsilon) : 1.0f;
    for (int i = 0; i < n; i += 2) {
      const float a = x[i] * inverse, b = x[i + 1] * inverse;
      y[i] = a * cosines[i] + -b * sines[i];
      y[i + 1] = b * cosines[i + 1] + a * sines[i + 1];
    }
  }

  static MOE_JAX_INLINE void score(const float* x, const float* weight, int count, int n, float* scores) {
    for (int e = 0; e < count; e++) scores[e] = E::dot(x, weight + static_cast<size_t>(e) * n, n);
  }

  // One token's choices: the best of its scores plus `bias`, ties to the lower number, and their scores' shares.
  static MOE_JAX_INLINE void choose(const RouteShape& s, float* scores, const float* bias, int32_t* ids,
                                    float* shares) {
    float biased[kMostExperts];
    const int experts = s.experts;
    if (s.softmax) {
      float most = scores[0], sum = 0;
      for (int e = 1; e < experts; e++) most = scores[e] > most ? scores[e] : most;
      for (int e = 0; e < experts; e++) sum += scores[e] = E::vanishing(E::splat(scores[e] - most))[0];
      for (int e = 0; e < experts; e++) scores[e] /= sum;
    } else {
      for (int e = 0; e < experts; e++) scores[e] = E::sigmoid(E::splat(scores[e]))[0];
    }
    for (int e = 0; e < experts; e++) biased[e] = scores[e] + bias[e];
    float sum = 0;
    for (uint32_t k = 0; k < s.choices; k++) {
      int best = 0;
      for (int e = 1; e < experts; e++) best = biased[e] > biased[best] ? e : best;
      biased[best] = -INFINITY;
      ids[k] = best;
      sum += shares[k] = scores[best];
    }
    for (uint32_t k = 0; k < s.choices; k++) {
      if (s.normalise) shares[k] /= sum + 1e-20f;
      shares[k] *= s.factor;
    }
  }
};

}  // namespace
}  // namespace moe_jax
