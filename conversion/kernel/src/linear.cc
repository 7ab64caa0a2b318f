#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace moe_jax {
namespace {

// Bytes of weights that a thread takes at once, small enough that they stay in its cache for all rows.
constexpr size_t kShare = 1 << 17;

struct Buffers {
  std::vector<uint8_t> codes;
  std::vector<float> zero, inverse;
};

}  // namespace

void run_linear(const Isa& isa, const Matrix& shape, int tokens, const float* x, const uint8_t* weights, float* y,
                int threads) {
  const int inputs = shape.inputs, outputs = shape.outputs, groups = outputs / kColumns;
  thread_local Buffers memory;
  memory.codes.resize(static_cast<size_t>(tokens) * inputs);
  memory.zero.resize(tokens), memory.inverse.resize(tokens);
  uint8_t* codes = memory.codes.data();
  float *zero = memory.zero.data(), *inverse = memory.inverse.data();
  Pool& pool = Pool::instance();
  pool.run_in_runs(tokens, threads, [&](int t) {
    const size_t at = static_cast<size_t>(t) * inputs;
    isa.quantize(x + at, inputs, codes + at, zero + t, inverse + t);
  });
  // Long shares suit memory, many suit threads of unequal speed.
  const int least = std::max(1, groups / (4 * threads)), most = std::max<int>(1, kShare / group_bytes(inputs));
  const int share = std::min(least, most), items = (groups + share - 1) / share;
  pool.run(items, threads, [&](int item, int) {
    const int first = item * share, count = std::min(share, groups - first);
    for (int begin = 0; begin < tokens; begin += isa.most_rows) {
      Rows rows;
      rows.count = std::min(isa.most_rows, tokens - begin);
      for (int m = 0; m < rows.count; m++) {
        rows.codes[m] = codes + static_cast<size_t>(begin + m) * inputs;
        rows.zero[m] = zero[begin + m];
        rows.inverse[m] = inverse[begin + m];
      }
      float* to = y + static_cast<size_t>(begin) * outputs + first * kColumns;
      isa.multiply(weights + first * group_bytes(inputs), count, inputs, rows, to, outputs);
    }
  });
}

bool run_embedding(const Matrix& shape, int tokens, const int32_t* ids, const uint8_t* weights, float* y) {
  const int inputs = shape.inputs, blocks = inputs / kBlock;
  for (int t = 0; t < tokens; t++, y += inputs) {
    if (ids[t] < 0 || ids[t] >= static_cast<int64_t>(shape.outputs)) return false;
    const int c = ids[t] % kColumns;
    const uint8_t* scales = weights + ids[t] / kColumns * group_bytes(inputs) + 64;
    const uint8_t* nibbles = scales + 32 * blocks;
    for (int b = 0; b < blocks; b++) {
      const float scale = bfloat16(scales + 32 * b + 2 * c);
      for (int i = 0; i < kBlock; i++) y[kBlock * b + i] = nibble(nibbles + 256 * b, c, i) * scale;
    }
  }
  return true;
}

}  // namespace moe_jax
