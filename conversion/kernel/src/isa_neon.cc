// Arm: dot products of bytes (every phone since about 2018), and 2x2 matrix products (i8mm, since about 2021).
#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "isa.h"
#include "paths.h"

#if defined(__clang__)
#define DOTPROD __attribute__((target("dotprod")))
#define I8MM __attribute__((target("dotprod,i8mm")))
#else
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#endif

namespace moe_jax {
namespace {

MOE_JAX_ROWS(, 4)

#if defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) & (1u << 20); }
bool has_i8mm() { return getauxval(AT_HWCAP2) & (1u << 13); }
#else  // Apple: M1 and A11 onwards have the one, M2 and A15 the other; no portable way to ask
bool has_dotprod() { return true; }
bool has_i8mm() { return false; }
#endif

MOE_JAX_INLINE float32x4_t bfloat16x4(const uint8_t* at) {
  const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(at));
  return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}

// Eight columns at a time: two vectors of four columns' dwords, a lane of the row times each.
template <int M>
DOTPROD void dot_tile(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride) {
  const int blocks = inputs / kBlock;
  const int8x16_t mask = vdupq_n_s8(static_cast<int8_t>(0xF0));
  for (int g = 0; g < groups; g++, weights += group_bytes(inputs)) {
    for (int half = 0; half < 2; half++) {
      const uint8_t *scales = weights + 64 + 16 * half, *nibbles = weights + 64 + 32 * blocks + 32 * half;
      const float* base = reinterpret_cast<const float*>(weights + 32 * half);
      float32x4_t sums[M][2];
      for (int m = 0; m < M; m++)
        for (int c = 0; c < 2; c++) sums[m][c] = vmulq_n_f32(vld1q_f32(base + 4 * c), rows.zero[m]);
      for (int b = 0; b < blocks; b++, nibbles += 256) {
        int32x4_t dots[M][2] = {};
        for (int d = 0; d < 4; d++) {
          int8x16_t low[2], high[2];
          for (int c = 0; c < 2; c++) {
            const int8x16_t pairs = vld1q_s8(reinterpret_cast<const int8_t*>(nibbles + 64 * d + 16 * c));
            low[c] = vshlq_n_s8(pairs, 4);
            high[c] = vandq_s8(pairs, mask);
          }
          for (int m = 0; m < M; m++) {
            const int8x8_t row = vld1_s8(reinterpret_cast<const int8_t*>(rows.codes[m]) + kBlock * b + 8 * d);
            for (int c = 0; c < 2; c++) {
              dots[m][c] = vdotq_lane_s32(dots[m][c], low[c], row, 0);
              dots[m][c] = vdotq_lane_s32(dots[m][c], high[c], row, 1);
            }
          }
        }
        for (int c = 0; c < 2; c++) {
          const float32x4_t scale = bfloat16x4(scales + 32 * b + 8 * c);
          for (int m = 0; m < M; m++) sums[m][c] = vfmaq_f32(sums[m][c], vcvtq_f32_s32(dots[m][c]), scale);
        }
      }
      for (int m = 0; m < M; m++)
        for (int c = 0; c < 2; c++)
          vst1q_f32(out + m * stride + g * kColumns + 8 * half + 4 * c, vmulq_n_f32(sums[m][c], rows.inverse[m]));
    }
  }
}

MOE_JAX_INLINE float32x4_t pair_of(const float* values) {  // v0 v0 v1 v1
  return vcombine_f32(vdup_n_f32(values[0]), vdup_n_f32(values[1]));
}

// Eight columns by P pairs of rows; a vector holds two rows times two columns.
template <int P>
I8MM void matrix_tile(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride) {
  const int blocks = inputs / kBlock;
  const int8x16_t mask = vdupq_n_s8(static_cast<int8_t>(0xF0));
  for (int g = 0; g < groups; g++, weights += group_bytes(inputs)) {
    for (int half = 0; half < 2; half++) {
      const uint8_t *scales = weights + 64 + 16 * half, *nibbles = weights + 64 + 32 * blocks + 32 * half;
      const float* base = reinterpret_cast<const float*>(weights + 32 * half);
      float32x4_t sums[P][4];
      for (int p = 0; p < P; p++) {
        for (int c = 0; c < 4; c++) {
          const float32x2_t two = vld1_f32(base + 2 * c);
          sums[p][c] = vmulq_f32(vcombine_f32(two, two), pair_of(rows.zero + 2 * p));
        }
      }
      for (int b = 0; b < blocks; b++, nibbles += 256) {
        int32x4_t dots[P][4] = {};
        for (int d = 0; d < 4; d++) {
          int8x16_t codes[4];  // two columns of eight codes each
          for (int c = 0; c < 2; c++) {
            const int8x16_t pairs = vld1q_s8(reinterpret_cast<const int8_t*>(nibbles + 64 * d + 16 * c));
            const int32x4_t low = vreinterpretq_s32_s8(vshlq_n_s8(pairs, 4));
            const int32x4_t high = vreinterpretq_s32_s8(vandq_s8(pairs, mask));
            codes[2 * c] = vreinterpretq_s8_s32(vzip1q_s32(low, high));
            codes[2 * c + 1] = vreinterpretq_s8_s32(vzip2q_s32(low, high));
          }
          for (int p = 0; p < P; p++) {
            const int8_t* first = reinterpret_cast<const int8_t*>(rows.codes[2 * p]) + kBlock * b + 8 * d;
            const int8_t* second = reinterpret_cast<const int8_t*>(rows.codes[2 * p + 1]) + kBlock * b + 8 * d;
            const int8x16_t both = vcombine_s8(vld1_s8(first), vld1_s8(second));
            for (int c = 0; c < 4; c++) dots[p][c] = vmmlaq_s32(dots[p][c], both, codes[c]);
          }
        }
        for (int c = 0; c < 2; c++) {
          const float32x4_t four = bfloat16x4(scales + 32 * b + 8 * c);
          const float32x2_t two[2] = {vget_low_f32(four), vget_high_f32(four)};
          for (int i = 0; i < 2; i++) {
            const float32x4_t scale = vcombine_f32(two[i], two[i]);
            for (int p = 0; p < P; p++)
              sums[p][2 * c + i] = vfmaq_f32(sums[p][2 * c + i], vcvtq_f32_s32(dots[p][2 * c + i]), scale);
          }
        }
      }
      for (int p = 0; p < P; p++) {
        float* to = out + 2 * p * stride + g * kColumns + 8 * half;
        for (int c = 0; c < 4; c++) {
          const float32x4_t value = vmulq_f32(sums[p][c], pair_of(rows.inverse + 2 * p));
          vst1_f32(to + 2 * c, vget_low_f32(value));
          vst1_f32(to + stride + 2 * c, vget_high_f32(value));
        }
      }
    }
  }
}

void dot_multiply(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride) {
  static constexpr decltype(&dot_tile<1>) tiles[] = {dot_tile<1>, dot_tile<2>, dot_tile<3>, dot_tile<4>};
  tiles[rows.count - 1](weights, groups, inputs, rows, out, stride);
}

// Pairs go through the matrix products; an odd last row, and the one row of decode, through dot products.
void matrix_multiply(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride) {
  static constexpr decltype(&matrix_tile<1>) tiles[] = {matrix_tile<1>, matrix_tile<2>, matrix_tile<3>};
  const int pairs = rows.count / 2;
  if (pairs) tiles[pairs - 1](weights, groups, inputs, rows, out, stride);
  if (rows.count % 2) {
    const int last = rows.count - 1;
    const Rows one = {{rows.codes[last]}, {rows.zero[last]}, {rows.inverse[last]}, 1};
    dot_tile<1>(weights, groups, inputs, one, out + last * stride, stride);
  }
}

}  // namespace

const Isa neon_dotprod = {"neon_dotprod", 4, has_dotprod, MOE_JAX_PATH(, dot_multiply)};
const Isa neon_i8mm = {"neon_i8mm", 6, [] { return has_dotprod() && has_i8mm(); }, MOE_JAX_PATH(, matrix_multiply)};

}  // namespace moe_jax
#endif
