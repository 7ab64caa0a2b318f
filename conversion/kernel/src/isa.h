// What each path has its own build of: products, rows (rounding, gate, sums, rotation, routing) and attention.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace moe_jax {

#if defined(__x86_64__) || defined(__i386__)
constexpr int kOffset = 128;  // x86 multiplies unsigned by signed bytes
#else
constexpr int kOffset = 0;
#endif

enum Activation : uint32_t { kSilu = 0, kGeluTanh = 1 };

// Rows rounded to INT8: x is about inverse * (codes - zero). Codes are stored plus kOffset, as XNNPACK keeps
// them; weights are multiplied as 16 times their code, which `zero` and `inverse` make up for.
struct Rows {
  const uint8_t* codes[16];
  float zero[16];     // 16 * (zero point + kOffset)
  float inverse[16];  // step / 16
  int count;
};

struct RouteShape {
  uint32_t experts, choices;    // E (at most kMostExperts), K (at most kMostChoices)
  uint32_t softmax, normalise;  // scores by softmax instead of sigmoid; shares that sum to 1 before `factor`
  float factor;
};
constexpr int kMostExperts = 1024, kMostChoices = 64;

// A few query rows against a piece of one group's cache: what is left of their softmax is a maximum and a sum.
struct Piece {
  const float *q, *k, *v;   // [rows, width], [count, width], [count, width]
  const float* mask;        // [count], added to the scores
  const float* next;        // keys to fetch meanwhile, those of the piece that this thread most likely takes next
  int rows, width, count;   // width a multiple of 16, rows at most kMostRows, count at most kMostPositions
  float *out, *most, *sum;  // [rows, width], [rows], [rows]: sum of v * exp(score - most), and of the exponentials
};
constexpr int kMostRows = 4, kMostPositions = 128;

struct Isa {
  const char* name;
  int most_rows;  // of a tile
  bool (*supported)();
  void (*quantize)(const float* x, int n, uint8_t* codes, float* zero, float* inverse);
  // out[row, 16 g + c] = row times column c of group g; `weights` is the first of `groups` groups.
  void (*multiply)(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride);
  void (*gate)(const float* gate, const float* up, int n, uint32_t activation, float* h);  // act(gate) * up
  void (*combine)(const float* const* terms, const float* weights, int count, int n, float* y);
  void (*norm)(const float* x, const float* weight, int n, float epsilon, float* y);
  void (*rotate)(const float* x, const float* cosines, const float* sines, int n, float epsilon, float* y);
  void (*score)(const float* x, const float* weight, int count, int n, float* scores);  // x times `count` rows
  // The choice of experts from `scores` [E], which are overwritten.
  void (*choose)(const RouteShape& s, float* scores, const float* bias, int32_t* ids, float* shares);
  void (*attend)(const Piece& piece);
  // One row's pieces put together: outs [count, step, n] of which the first of `step` counts, most and sums likewise.
  void (*merge)(const float* outs, const float* most, const float* sums, int count, int step, int n, float* y);
};

// The best that this processor has, or the one called `name` (nullptr if it is unknown or not supported).
const Isa* find_isa(const char* name);

extern const Isa portable, avx2, avx512vnni, neon_dotprod, neon_i8mm;  // those of this architecture exist

}  // namespace moe_jax
