#include "experts.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace moe_jax {
namespace {

struct Tile {
  int expert, begin, end;  // positions in the order sorted by expert
};

// Memory that the calling thread keeps, so that layers and signatures share it.
struct Buffers {
  std::vector<uint8_t> codes, h_codes;
  std::vector<float> zero, inverse, h, products, terms;
};

template <typename T>
T* at_least(std::vector<T>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

// Tiles of one expert's pairs, of nearly equal size, at most `most` rows each.
std::vector<Tile> cut(const std::vector<int>& first, int most) {
  std::vector<Tile> tiles;
  for (size_t e = 0; e + 1 < first.size(); e++) {
    const int rows = first[e + 1] - first[e], parts = (rows + most - 1) / most;
    for (int i = 0; i < parts; i++)
      tiles.push_back({static_cast<int>(e), first[e] + rows * i / parts, first[e] + rows * (i + 1) / parts});
  }
  return tiles;
}

}  // namespace

void gate_up(const Isa& isa, const uint8_t* expert, int width, int hidden, uint32_t activation, const Rows& rows, int g,
             int n, float* scratch, float* to, size_t stride) {
  const int columns = n * kColumns;
  const uint8_t* weights = expert + g * group_bytes(width);
  float* up = scratch + rows.count * columns;
  isa.multiply(weights, n, width, rows, scratch, columns);
  isa.multiply(weights + matrix_bytes(hidden, width), n, width, rows, up, columns);
  for (int m = 0; m < rows.count; m++)
    isa.gate(scratch + m * columns, up + m * columns, columns, activation, to + m * stride + g * kColumns);
}

bool run_experts(const Isa& isa, const Shape& s, const Call& call, int threads) {
  const int tokens = call.tokens, choices = s.choices, routed = tokens * choices;
  const int width = s.width, hidden = s.hidden;
  std::vector<int> first(s.experts + 1, 0), place(routed), token(routed);
  for (int i = 0; i < routed; i++) {
    if (call.ids[i] < 0 || call.ids[i] >= static_cast<int>(s.experts)) return false;
    first[call.ids[i] + 1]++;
  }
  for (uint32_t e = 0; e < s.experts; e++) first[e + 1] += first[e];
  std::vector<int> next(first.begin(), first.end() - 1);
  for (int i = 0; i < routed; i++) token[place[i] = next[call.ids[i]]++] = i / choices;
  const std::vector<Tile> tiles = cut(first, isa.most_rows);
  const int count = static_cast<int>(tiles.size());

  // With few tiles, as in decode, threads share the columns of a tile; else each takes whole tiles.
  const bool whole = count >= 4 * threads || threads == 1;
  const int parts = whole ? 1 : column_runs(threads, count, hidden / kColumns);

  thread_local Buffers memory;
  const size_t row = isa.most_rows, slots = threads;
  uint8_t* codes = at_least(memory.codes, static_cast<size_t>(tokens) * width);
  float *zero = at_least(memory.zero, tokens), *inverse = at_least(memory.inverse, tokens);
  float* h = at_least(memory.h, (whole ? slots * row : routed) * hidden);
  float* products = at_least(memory.products, slots * row * 2 * hidden);
  uint8_t* h_codes = at_least(memory.h_codes, slots * row * hidden);
  float* terms = at_least(memory.terms, static_cast<size_t>(routed) * width);

  const size_t up_group = group_bytes(width), down_group = group_bytes(hidden), all = expert_bytes(s);
  const int up_groups = hidden / kColumns, down_groups = width / kColumns;
  Pool& pool = Pool::instance();

  pool.run_in_runs(tokens, threads, [&](int t) {
    const size_t at = static_cast<size_t>(t) * width;
    isa.quantize(call.x + at, width, codes + at, zero + t, inverse + t);
  });

  // h of a tile, columns of `part`
  const auto up = [&](const Tile& tile, int part, int slot, float* to) {
    Rows rows;
    rows.count = tile.end - tile.begin;
    for (int m = 0; m < rows.count; m++) {
      const int t = token[tile.begin + m];
      rows.codes[m] = codes + static_cast<size_t>(t) * width;
      rows.zero[m] = zero[t];
      rows.inverse[m] = inverse[t];
    }
    const int g = up_groups * part / parts, n = up_groups * (part + 1) / parts - g;
    gate_up(isa, call.bank + tile.expert * all, width, hidden, s.activation, rows, g, n,
            products + slot * row * 2 * hidden, to, hidden);
  };

  // the tile's rows of `terms`, columns of `part`
  const auto down = [&](const Tile& tile, int part, int slot, const float* from) {
    Rows rows;
    rows.count = tile.end - tile.begin;
    uint8_t* own = h_codes + slot * row * hidden;
    for (int m = 0; m < rows.count; m++) {
      rows.codes[m] = own + m * hidden;
      isa.quantize(from + m * hidden, hidden, own + m * hidden, rows.zero + m, rows.inverse + m);
    }
    const int g = down_groups * part / parts, n = down_groups * (part + 1) / parts - g;
    const uint8_t* weights = call.bank + tile.expert * all + 2 * up_groups * up_group + g * down_group;
    float* to = terms + static_cast<size_t>(tile.begin) * width + g * kColumns;
    isa.multiply(weights, n, hidden, rows, to, width);
  };

  if (whole) {
    pool.run(count, threads, [&](int item, int slot) {
      float* own = h + slot * row * hidden;
      up(tiles[item], 0, slot, own);
      down(tiles[item], 0, slot, own);
    });
  } else {
    pool.run(count * parts, threads, [&](int item, int slot) {
      const Tile& tile = tiles[item / parts];
      up(tile, item % parts, slot, h + static_cast<size_t>(tile.begin) * hidden);
    });
    pool.run(count * parts, threads, [&](int item, int slot) {
      const Tile& tile = tiles[item / parts];
      down(tile, item % parts, slot, h + static_cast<size_t>(tile.begin) * hidden);
    });
  }

  pool.run_in_runs(tokens, threads, [&](int t) {
    const float* mine[kMostChoices];
    for (int k = 0; k < choices; k++) mine[k] = terms + static_cast<size_t>(place[t * choices + k]) * width;
    const size_t at = static_cast<size_t>(t);
    isa.combine(mine, call.weights + at * choices, choices, width, call.y + at * width);
  });
  return true;
}

}  // namespace moe_jax
