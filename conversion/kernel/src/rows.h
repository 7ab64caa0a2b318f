// Element-wise work on rows, written once with the compilers' vector types and inlined into each path.
//
// Every operation is rounded by itself (the build forbids contraction), so all paths give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "experts.h"
#include "isa.h"

#define MOE_JAX_INLINE __attribute__((always_inline)) inline

namespace moe_jax {
namespace {

// Vectors as wide as the path's registers: compilers take wider ones apart badly.
template <int N>
struct Vectors;
#define MOE_JAX_VECTORS(N)                                   \
  template <>                                                \
  struct Vectors<N> {                                        \
    typedef float F __attribute__((vector_size(4 * N)));     \
    typedef int32_t I __attribute__((vector_size(4 * N)));   \
    typedef uint8_t B __attribute__((vector_size(N)));       \
  };
MOE_JAX_VECTORS(4)
MOE_JAX_VECTORS(8)
MOE_JAX_VECTORS(16)

template <int N>
struct Elements {
  using F = typename Vectors<N>::F;
  using I = typename Vectors<N>::I;
  using B = typename Vectors<N>::B;

  static MOE_JAX_INLINE F splat(float value) { return F{} + value; }

  static MOE_JAX_INLINE F load(const float* from) {
    F v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }

  // Adding 1.5 * 2^23 leaves the nearest integer (halves to even) in the low bits.
  static constexpr float kMagic = 12582912.0f;

  static MOE_JAX_INLINE I magic_bits(F v) {
    I bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits - 0x4B400000;
  }

  // XNNPACK's dynamic quantisation of a row (n a multiple of 16): asymmetric, zero always representable.
  static MOE_JAX_INLINE void quantize(const float* x, int n, uint8_t* codes, float* zero, float* inverse) {
    F low = splat(0), high = splat(0);
    for (int i = 0; i < n; i += N) {
      const F v = load(x + i);
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
      I q = magic_bits(load(x + i) * splat(scale) + splat(kMagic)) + shift;
      q = q < floor ? floor : q;
      q = q > ceiling ? ceiling : q;
      const B bytes = __builtin_convertvector(q, B);
      std::memcpy(codes + i, &bytes, sizeof bytes);
    }
    *zero = 16.0f * (point + kOffset);
    *inverse = 1.0f / scale * 0.0625f;
  }

  // 1 / (1 + exp(-x)), within 2 units in the last place.
  static MOE_JAX_INLINE F sigmoid(F x) {
    F z = x < 0 ? x : -x;
    z = z < splat(-87.0f) ? splat(-87.0f) : z;
    const F rounded = z * splat(1.44269504f) + splat(kMagic), n = rounded - splat(kMagic);
    F t = z - n * splat(0.693145752f);
    t = t - n * splat(1.42860677e-6f);
    F p = splat(1.0f / 720) * t + splat(1.0f / 120);
    p = p * t + splat(1.0f / 24);
    p = p * t + splat(1.0f / 6);
    p = p * t + splat(0.5f);
    p = p * t * t + t + splat(1.0f);
    const I exponent = (magic_bits(rounded) + 127) << 23;
    F power;
    std::memcpy(&power, &exponent, sizeof power);
    const F e = p * power, small = e / (e + splat(1.0f));
    return x < 0 ? small : splat(1.0f) - small;
  }

  static MOE_JAX_INLINE void gate(const float* gate, const float* up, int n, uint32_t activation, float* h) {
    for (int i = 0; i < n; i += N) {
      const F g = load(gate + i);
      // tanh(z) = 2 sigmoid(2z) - 1, so both activations are g times a sigmoid.
      const F bent = (g * g * splat(0.044715f) + splat(1.0f)) * g * splat(1.59576912f);
      const F y = g * sigmoid(activation == kGeluTanh ? bent : g) * load(up + i);
      std::memcpy(h + i, &y, sizeof y);
    }
  }

  static MOE_JAX_INLINE void combine(const float* const* terms, const float* weights, int count, int n, float* y) {
    for (int i = 0; i < n; i += N) {
      F sum = load(terms[0] + i) * splat(weights[0]);
      for (int k = 1; k < count; k++) sum += load(terms[k] + i) * splat(weights[k]);
      std::memcpy(y + i, &sum, sizeof sum);
    }
  }
};

}  // namespace
}  // namespace moe_jax

// The element-wise functions of one path, compiled for `target` with `lanes` lanes.
#define MOE_JAX_ROWS(target, lanes)                                                                 \
  target void quantize(const float* x, int n, uint8_t* codes, float* zero, float* inverse) {        \
    Elements<lanes>::quantize(x, n, codes, zero, inverse);                                          \
  }                                                                                                 \
  target void gate(const float* g, const float* up, int n, uint32_t activation, float* h) {         \
    Elements<lanes>::gate(g, up, n, activation, h);                                                 \
  }                                                                                                 \
  target void combine(const float* const* terms, const float* weights, int count, int n, float* y) { \
    Elements<lanes>::combine(terms, weights, count, n, y);                                          \
  }
