// A few rows of queries against a piece of a cache, and pieces put together.
#pragma once

#include "isa.h"
#include "vectors.h"

namespace moe_jax {
namespace {

template <int N>
struct AttentionWork {
  using E = Elements<N>;
  using F = typename E::F;

  template <int R>
  static MOE_JAX_INLINE void attend_rows(const Piece& c) {
    float scores[R][kMostPositions];
    for (int p = 0; p < c.count; p++) {
      // Values are needed soon, and the hardware's prefetcher stops at pages.
      for (int i = 0; i < c.width; i += 16) __builtin_prefetch(c.v + static_cast<size_t>(p) * c.width + i, 0, 2);
      typename E::Sum sums[R] = {};
      for (int i = 0; i < c.width; i += E::kLanes)
        for (int j = 0; j < E::kParts; j++) {
          const F key = E::load(c.k + static_cast<size_t>(p) * c.width + i + j * N);
          for (int r = 0; r < R; r++) sums[r].part[j] += key * E::load(c.q + r * c.width + i + j * N);
        }
      for (int r = 0; r < R; r++) scores[r][p] = E::total(sums[r]) + c.mask[p];
    }
    for (int r = 0; r < R; r++) {
      float most = scores[r][0];
      for (int p = 1; p < c.count; p++) most = scores[r][p] > most ? scores[r][p] : most;
      for (int p = c.count; p % E::kLanes; p++) scores[r][p] = -INFINITY;
      typename E::Sum sum = {};
      for (int p = 0; p < c.count; p += E::kLanes)
        for (int j = 0; j < E::kParts; j++) {
          float* at = scores[r] + p + j * N;
          const F e = E::vanishing(E::load(at) - E::splat(most));
          E::store(at, e);
          sum.part[j] += e;
        }
      c.most[r] = most;
      c.sum[r] = E::total(sum);
    }
    constexpr int kWide = 64 / 16;  // registers of a row's outputs that are added up at once
    for (int i = 0; i < c.width; i += kWide * N) {
      const int wide = c.width - i < kWide * N ? (c.width - i) / N : kWide;
      F sums[R][kWide] = {};
      for (int p = 0; p < c.count; p++) {
        const float* value = c.v + static_cast<size_t>(p) * c.width + i;
        for (int j = 0; j < kWide; j++) {
          if (j >= wide) break;
          const F one = E::load(value + j * N);
          for (int r = 0; r < R; r++) sums[r][j] += one * E::splat(scores[r][p]);
        }
      }
      for (int r = 0; r < R; r++) std::memcpy(c.out + r * c.width + i, sums[r], wide * sizeof(F));
    }
  }

  static MOE_JAX_INLINE void attend(const Piece& c) {
    switch (c.rows) {
      case 1: return attend_rows<1>(c);
      case 2: return attend_rows<2>(c);
      case 3: return attend_rows<3>(c);
      default: return attend_rows<4>(c);
    }
  }

  static MOE_JAX_INLINE void merge(const float* outs, const float* most, const float* sums, int count, int step,
                                   int n, float* y) {
    float highest = most[0], all = 0;
    for (int c = 1; c < count; c++) highest = most[c * step] > highest ? most[c * step] : highest;
    for (int c = 0; c < count; c++) all += sums[c * step] * E::vanishing(E::splat(most[c * step] - highest))[0];
    for (int i = 0; i < n; i += N) E::store(y + i, E::splat(0.0f));
    for (int c = 0; c < count; c++) {
      const F share = E::splat(E::vanishing(E::splat(most[c * step] - highest))[0] / all);
      const float* part = outs + static_cast<size_t>(c) * step * n;
      for (int i = 0; i < n; i += N) E::store(y + i, E::load(y + i) + E::load(part + i) * share);
    }
  }
};

}  // namespace
}  // namespace moe_jax
