// Plain C++: the definition that the other paths equal bit for bit, and the choice between them.
#include <cmath>
#include <cstring>

#include "isa.h"
#include "paths.h"

namespace moe_jax {
namespace {

MOE_JAX_ROWS(, 4)

void multiply(const uint8_t* weights, int groups, int inputs, const Rows& rows, float* out, size_t stride) {
  const int blocks = inputs / kBlock;
  for (int g = 0; g < groups; g++, weights += group_bytes(inputs)) {
    const uint8_t *scales = weights + 64, *nibbles = scales + 32 * blocks;
    for (int m = 0; m < rows.count; m++) {
      for (int c = 0; c < kColumns; c++) {
        float sum;
        std::memcpy(&sum, weights + 4 * c, 4);
        sum *= rows.zero[m];
        for (int b = 0; b < blocks; b++) {
          int32_t dot = 0;
          for (int i = 0; i < kBlock; i++) {
            const uint8_t row = rows.codes[m][kBlock * b + i];
            dot += (kOffset ? row : static_cast<int8_t>(row)) * 16 * nibble(nibbles + 256 * b, c, i);
          }
          sum = std::fma(static_cast<float>(dot), bfloat16(scales + 32 * b + 2 * c), sum);
        }
        out[m * stride + g * kColumns + c] = sum * rows.inverse[m];
      }
    }
  }
}

}  // namespace

const Isa portable = {"portable", 16, [] { return true; }, MOE_JAX_PATH(, multiply)};

const Isa* find_isa(const char* name) {
  static const Isa* const all[] = {
#if defined(__x86_64__)
      &avx512vnni, &avx2,
#elif defined(__aarch64__)
      &neon_i8mm, &neon_dotprod,
#endif
      &portable};
  for (const Isa* isa : all) {
    if ((!name || !std::strcmp(name, isa->name)) && isa->supported()) return isa;
  }
  return nullptr;
}

}  // namespace moe_jax
