// What differs between processors: rounding rows, multiplying tiles, the gate, the sum over choices.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_jax {

#if defined(__x86_64__) || defined(__i386__)
constexpr int kOffset = 128;  // x86 multiplies unsigned by signed bytes
#else
constexpr int kOffset = 0;
#endif

// Rows rounded to INT8: x is about inverse * (codes - zero). Codes are stored plus kOffset, as XNNPACK keeps
// them; weights are multiplied as 16 times their code, which `zero` and `inverse` make up for.
struct Rows {
  const uint8_t* codes[16];
  float zero[16];     // 16 * (zero point + kOffset)
  float inverse[16];  // step / 16
  int count;
};

struct Isa {
  const char* name;
  int most_rows;  // of a tile
  bool (*supported)();
  void (*quantize)(const float* x, int n, uint8_t* codes, float* zero, float* inverse);
  // out[row, 16 g + c] = row times column c of group g; `weights` is the first of `groups` groups.
  void (*multiply)(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride);
  void (*gate)(const float* gate, const float* up, int n, uint32_t activation, float* h);  // act(gate) * up
  void (*combine)(const float* const* terms, const float* weights, int count, int n, float* y);
};

// The best that this processor has, or the one called `name` (nullptr if it is unknown or not supported).
const Isa* find_isa(const char* name);

extern const Isa portable, avx2, avx512vnni, neon_dotprod, neon_i8mm;  // those of this architecture exist

}  // namespace moe_jax
