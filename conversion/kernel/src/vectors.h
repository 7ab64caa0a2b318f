// Arithmetic on the compilers' vector types: written once, inlined into each path.
//
// Every operation is rounded by itself (the build forbids contraction), so all paths give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define MOE_JAX_INLINE __attribute__((always_inline)) inline
#if defined(__clang__)
#define MOE_JAX_SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#define MOE_JAX_PICK(v, w, ...) __builtin_shufflevector(v, w, __VA_ARGS__)
#else
#define MOE_JAX_SHUFFLE(v, ...) __builtin_shuffle(v, I{__VA_ARGS__})
#define MOE_JAX_PICK(v, w, ...) __builtin_shuffle(v, w, I{__VA_ARGS__})
#endif

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

  static MOE_JAX_INLINE F splat(float value) {
#if defined(__clang__)
    return value - F{};  // x - 0 is x, 0 + x not for -0
#else
    return __builtin_shuffle(F{value}, I{});  // from the above GCC makes an insertion for each lane
#endif
  }

  static MOE_JAX_INLINE F load(const float* from) {
    F v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }

  static MOE_JAX_INLINE void store(float* to, F v) { std::memcpy(to, &v, sizeof v); }

  // Adding 1.5 * 2^23 leaves the nearest integer (halves to even) in the low bits.
  static constexpr float kMagic = 12582912.0f;

  static MOE_JAX_INLINE I magic_bits(F v) {
    I bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits - 0x4B400000;
  }

  // exp(z) for z <= 0, within 2 units in the last place; below -87, where it leaves the normal numbers, exp(-87).
  static MOE_JAX_INLINE F exponential(F z) {
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
    return p * power;
  }

  // The same, but 0 below -87, so that what is masked adds nothing.
  static MOE_JAX_INLINE F vanishing(F z) { return z < splat(-87.0f) ? splat(0.0f) : exponential(z); }

  // 1 / (1 + exp(-x)), within 2 units in the last place.
  static MOE_JAX_INLINE F sigmoid(F x) {
    const F e = exponential(x < 0 ? x : -x), small = e / (e + splat(1.0f));
    return x < 0 ? small : splat(1.0f) - small;
  }

  // Sums have 16 lanes on every path, whatever a register holds, so that all paths add in the same order.
  static constexpr int kLanes = 16, kParts = kLanes / N;
  struct Sum {
    F part[kParts];
  };

  // Lane i and i + 8, then 4 apart, 2 apart, 1 apart; in registers, since a way through memory takes longer than all
  // else that attention does with a position.
  static MOE_JAX_INLINE float total(const Sum& sum) {
    F v = sum.part[0];
    if constexpr (N == 4) v = (v + sum.part[2]) + (sum.part[1] + sum.part[3]);
    if constexpr (N == 8) v += sum.part[1];
    if constexpr (N == 16) {
      v += MOE_JAX_SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
      v += MOE_JAX_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
      v += MOE_JAX_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
      v += MOE_JAX_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    } else if constexpr (N == 8) {
      v += MOE_JAX_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3);
      v += MOE_JAX_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5);
      v += MOE_JAX_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6);
    } else {
      v += MOE_JAX_SHUFFLE(v, 2, 3, 0, 1);
      v += MOE_JAX_SHUFFLE(v, 1, 0, 3, 2);
    }
    return v[0];
  }

  // `total` of kTogether sums at once, in the same order, with half of the shuffles or fewer.
  static constexpr int kTogether = N / 4;
  static MOE_JAX_INLINE void totals(const Sum* sums, float* to) {
    if constexpr (N == 16) {
      const F a = sums[0].part[0], b = sums[1].part[0], c = sums[2].part[0], d = sums[3].part[0];
      const F ab = MOE_JAX_PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   MOE_JAX_PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
      const F cd = MOE_JAX_PICK(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   MOE_JAX_PICK(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
      F v = MOE_JAX_PICK(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
            MOE_JAX_PICK(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
      v += MOE_JAX_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
      v += MOE_JAX_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
      v = MOE_JAX_SHUFFLE(v, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
      std::memcpy(to, &v, 4 * sizeof(float));
    } else if constexpr (N == 8) {
      const F a = sums[0].part[0] + sums[0].part[1], b = sums[1].part[0] + sums[1].part[1];
      F v = MOE_JAX_PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + MOE_JAX_PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
      v += MOE_JAX_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5);
      v += MOE_JAX_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6);
      to[0] = v[0], to[1] = v[4];
    } else {
      to[0] = total(sums[0]);
    }
  }

  // Of n products, a multiple of 16.
  static MOE_JAX_INLINE float dot(const float* a, const float* b, int n) {
    Sum sum = {};
    for (int i = 0; i < n; i += kLanes)
      for (int j = 0; j < kParts; j++) sum.part[j] += load(a + i + j * N) * load(b + i + j * N);
    return total(sum);
  }
};

}  // namespace
}  // namespace moe_jax
