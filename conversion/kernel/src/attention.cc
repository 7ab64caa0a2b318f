#include "attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace moe_jax {

// Pieces of a fixed number of positions are shared among threads; each leaves a softmax of its own, with its maximum
// and its sum, and these are put together in order at the end.
void run_attention(const Isa& isa, const AttentionCall& c, int threads) {
  const int width = c.width, pieces = (c.used + kMostPositions - 1) / kMostPositions;
  const size_t of_group = static_cast<size_t>(c.rows) * width, of_cache = static_cast<size_t>(c.length) * width;
  thread_local std::vector<float> memory;
  const size_t ends = static_cast<size_t>(c.groups) * pieces * c.rows;  // of rows over one piece
  memory.resize(ends * (width + 2));
  float *outs = memory.data(), *most = outs + ends * width, *sums = most + ends;

  const auto keys_of = [&](int item) {
    return c.k + item / pieces * of_cache + static_cast<size_t>(item % pieces) * kMostPositions * width;
  };
  const int items = c.groups * pieces;
  Pool::instance().run(items, threads, [&](int item, int slot) {
    const int group = item / pieces, begin = item % pieces * kMostPositions;
    const bool goes_on = item + 1 < Pool::first_of(slot + 1, items, threads);
    const float* next = keys_of(goes_on ? item + 1 : item);  // its own are there already
    for (int row = 0; row < c.rows; row += kMostRows) {
      const int rows = std::min(kMostRows, c.rows - row);
      const size_t at = static_cast<size_t>(item) * c.rows + row, of_piece = static_cast<size_t>(begin) * width;
      isa.attend({c.q + group * of_group + static_cast<size_t>(row) * width, c.k + group * of_cache + of_piece,
                  c.v + group * of_cache + of_piece, c.mask + begin, next, rows, width,
                  std::min(kMostPositions, c.used - begin), outs + at * width, most + at, sums + at});
    }
  });

  for (int group = 0; group < c.groups; group++) {
    for (int row = 0; row < c.rows; row++) {
      const size_t first = static_cast<size_t>(group) * pieces * c.rows + row;
      isa.merge(outs + first * width, most + first, sums + first, pieces, c.rows, width,
                c.out + group * of_group + static_cast<size_t>(row) * width);
    }
  }
}

}  // namespace moe_jax
