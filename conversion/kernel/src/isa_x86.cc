// AVX2, and AVX-512 with VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "paths.h"

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))

namespace moe_jax {
namespace {

// Fetches weights that come some way after `at`: the hardware's own prefetcher stops at pages. Those that are used
// once go past the L2 cache.
template <bool kOnce>
void fetch(const uint8_t* at) {
  if constexpr (kOnce)
    _mm_prefetch(at + 6144, _MM_HINT_NTA);
  else
    _mm_prefetch(at + 16384, _MM_HINT_T1);
}

// Scales of one group's blocks. For one row they are copied, so that weights are read strictly in the order in which
// they lie: in two streams, scales beside nibbles, a token of size S took 1.2 times as long (Zen 5, whose memory gave
// 40 of its 50 GB/s). More rows compute for longer than they read.
template <int M, bool kOnce>
class Scales {
 public:
  Scales(const uint8_t* scales, int blocks) : scales_(scales), blocks_(blocks) {}

  const uint8_t* of(int block) {
    if constexpr (M > 1) {
      fetch<kOnce>(scales_ + 32 * block);
      return scales_ + 32 * block;
    }
    if (block % kCopied == 0 && block != held_) {
      held_ = block;
      const int count = std::min(kCopied, blocks_ - block);
      for (int i = 32 * block; i < 32 * (block + count); i += 32) {
        fetch<kOnce>(scales_ + i);
        std::memcpy(copy_ + i % sizeof copy_, scales_ + i, 32);
      }
    }
    return copy_ + 32 * (block % kCopied);
  }

 private:
  static constexpr int kCopied = 64;  // blocks
  const uint8_t* scales_;
  int blocks_, held_ = -1;
  alignas(32) uint8_t copy_[M > 1 ? 1 : 32 * kCopied];
};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

int32_t four(const uint8_t* codes) {
  int32_t bits;
  std::memcpy(&bits, codes, 4);
  return bits;
}

namespace wide {

MOE_JAX_ROWS(AVX512, 16)

template <int M>
AVX512 void tile(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride) {
  constexpr bool kOnce = M == 1;  // after more rows come others, for the same weights
  const int blocks = inputs / kBlock;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xF0));
  for (int g = 0; g < groups; g++, weights += group_bytes(inputs)) {
    const uint8_t* nibbles = weights + 64 + 32 * blocks;
    Scales<M, kOnce> scales(weights + 64, blocks);
    __m512 sums[M];
    for (int m = 0; m < M; m++) sums[m] = _mm512_mul_ps(_mm512_loadu_ps(weights), _mm512_set1_ps(rows.zero[m]));
    for (int b = 0; b < blocks; b++, nibbles += 256) {
      const auto* halves = reinterpret_cast<const __m256i*>(scales.of(b));
      __m512i codes[8];
      for (int d = 0; d < 4; d++) {
        fetch<kOnce>(nibbles + 64 * d);
        const __m512i pairs = _mm512_loadu_si512(nibbles + 64 * d);
        codes[2 * d] = _mm512_and_si512(_mm512_slli_epi32(pairs, 4), mask);
        codes[2 * d + 1] = _mm512_and_si512(pairs, mask);
      }
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(halves));
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
      for (int m = 0; m < M; m++) {
        const uint8_t* row = rows.codes[m] + kBlock * b;
        __m512i dots[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int d = 0; d < 8; d++)
          dots[d % 2] = _mm512_dpbusd_epi32(dots[d % 2], _mm512_set1_epi32(four(row + 4 * d)), codes[d]);
        const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(dots[0], dots[1]));
        sums[m] = _mm512_fmadd_ps(dot, scale, sums[m]);
      }
    }
    for (int m = 0; m < M; m++)
      _mm512_storeu_ps(out + m * stride + g * kColumns, _mm512_mul_ps(sums[m], _mm512_set1_ps(rows.inverse[m])));
  }
}

void multiply(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride) {
  static constexpr decltype(&tile<1>) tiles[] = {
      tile<1>, tile<2>,  tile<3>,  tile<4>,  tile<5>,  tile<6>,  tile<7>,
      tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14>};
  tiles[rows.count - 1](weights, groups, inputs, rows, out, stride);
}

bool supported() {
  return has_avx2() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace wide

namespace narrow {

MOE_JAX_ROWS(AVX2, 8)

// Eight columns at a time, so weights are used twice. Sums of products are kept in 16 bits, which a block cannot
// overflow as long as codes are not multiplied by 16 (255 * 8 * 16 = 32640); so the scales are.
template <int M>
AVX2 void tile(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride) {
  const int blocks = inputs / kBlock;
  const __m256i mask = _mm256_set1_epi8(0xF), ones = _mm256_set1_epi16(1);
  const __m256i signs = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  for (int g = 0; g < groups; g++, weights += group_bytes(inputs)) {
    Scales<M, false> scales(weights + 64, blocks);
    for (int half = 0; half < 2; half++) {
      const uint8_t* nibbles = weights + 64 + 32 * blocks + 32 * half;
      const __m256 base = _mm256_loadu_ps(reinterpret_cast<const float*>(weights + 32 * half));
      __m256 sums[M];
      for (int m = 0; m < M; m++) sums[m] = _mm256_mul_ps(base, _mm256_set1_ps(rows.zero[m]));
      for (int b = 0; b < blocks; b++, nibbles += 256) {
        const auto* halves = reinterpret_cast<const __m128i*>(scales.of(b) + 16 * half);
        __m256i codes[8];
        for (int d = 0; d < 4; d++) {
          fetch<false>(nibbles + 64 * d);
          const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(nibbles + 64 * d));
          codes[2 * d] = _mm256_shuffle_epi8(signs, _mm256_and_si256(pairs, mask));
          codes[2 * d + 1] = _mm256_shuffle_epi8(signs, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), mask));
        }
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves));
        __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
        scale = _mm256_mul_ps(scale, _mm256_set1_ps(16));
        for (int m = 0; m < M; m++) {
          const uint8_t* row = rows.codes[m] + kBlock * b;
          __m256i dots = _mm256_setzero_si256();
          for (int d = 0; d < 8; d++)
            dots = _mm256_add_epi16(dots, _mm256_maddubs_epi16(_mm256_set1_epi32(four(row + 4 * d)), codes[d]));
          const __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots, ones));
          sums[m] = _mm256_fmadd_ps(dot, scale, sums[m]);
        }
      }
      for (int m = 0; m < M; m++)
        _mm256_storeu_ps(out + m * stride + g * kColumns + 8 * half,
                         _mm256_mul_ps(sums[m], _mm256_set1_ps(rows.inverse[m])));
    }
  }
}

void multiply(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride) {
  static constexpr decltype(&tile<1>) tiles[] = {tile<1>, tile<2>, tile<3>, tile<4>};
  tiles[rows.count - 1](weights, groups, inputs, rows, out, stride);
}

}  // namespace narrow
}  // namespace

const Isa avx512vnni = {"avx512vnni", 14, wide::supported, MOE_JAX_PATH(wide::, wide::multiply)};
const Isa avx2 = {"avx2", 4, has_avx2, MOE_JAX_PATH(narrow::, narrow::multiply)};

}  // namespace moe_jax
#endif
