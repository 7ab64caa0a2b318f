#include "token.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "pool.h"

namespace moe_jax {
namespace {

constexpr int kRouterRows = 8;  // of the router that a thread takes at once

// Memory that the calling thread keeps, cut into pieces of one type; what is called from here keeps its own.
template <typename T>
class Scratch {
 public:
  explicit Scratch(size_t size) : memory_(kept()) {
    if (memory_.size() < size) memory_.resize(size);
  }
  T* take(size_t size) {
    T* piece = memory_.data() + used_;
    used_ += size;
    return piece;
  }

 private:
  static std::vector<T>& kept() {
    thread_local std::vector<T> memory;
    return memory;
  }
  std::vector<T>& memory_;
  size_t used_ = 0;
};

void add(const Isa& isa, const float* x, int n, float* y) {
  const float* const terms[] = {x, y};
  const float ones[] = {1, 1};
  isa.combine(terms, ones, 2, n, y);
}

// One of the feed-forwards that a token goes through.
struct Part {
  const uint8_t* weights;
  int hidden;
  float* h;        // [hidden]
  uint8_t* codes;  // of h
  Rows rows;       // which has one row, the codes
};

}  // namespace

void run_self_attention(const Isa& isa, const AttentionShape& s, const SelfAttention& c, int threads) {
  const int width = s.width, heads = s.heads, groups = s.groups, n = s.head_width, all = heads + 2 * groups;
  const size_t size = n;
  Scratch<float> memory(width + (3 * heads + 3 * groups) * size);
  float *h = memory.take(width), *qkv = memory.take(all * size);
  float *turned = memory.take((heads + groups) * size), *seen = memory.take(heads * size);

  isa.norm(c.x, c.norm, width, s.epsilon, h);
  run_linear(isa, {static_cast<uint32_t>(all * n), s.width}, 1, h, c.qkv, qkv, threads);
  for (int head = 0; head < heads + groups; head++)
    isa.rotate(qkv + head * n, c.cosines, c.sines, n, s.head_epsilon, turned + head * n);
  const float scale = 1.0f / std::sqrt(static_cast<float>(n));
  for (int i = 0; i < heads * n; i++) turned[i] *= scale;
  for (int g = 0; g < groups; g++) {
    const size_t at = (static_cast<size_t>(g) * c.length + c.position) * n;
    std::memcpy(c.k + at, turned + (heads + g) * n, n * sizeof(float));
    std::memcpy(c.v + at, qkv + (heads + groups + g) * n, n * sizeof(float));
  }
  if (!c.y) return;  // nobody reads it in the last layer of a prefill, so the runtime has no memory for it
  run_attention(isa, {groups, heads / groups, n, c.length, c.position + 1, turned, c.k, c.v, c.mask, seen}, threads);
  run_linear(isa, {s.width, static_cast<uint32_t>(heads * n)}, 1, seen, c.out, c.y, threads);
  add(isa, c.x, width, c.y);
}

// Three regions: the router's scores beside the shared expert's first product, the chosen ones' first products, and
// columns of the sum, each over all second products.
void run_mixture(const Isa& isa, const MixtureShape& s, const Mixture& c, int threads) {
  const Shape& e = s.experts;
  const int width = e.width, hidden = e.hidden, shared = s.shared, choices = e.choices, experts = e.experts;
  const int count = choices + (shared > 0);
  const size_t slots = threads, columns = std::max({2 * hidden, 2 * shared, count * width});
  Scratch<float> memory(width + experts + static_cast<size_t>(choices) * hidden + shared + slots * columns);
  Scratch<uint8_t> bytes(width + static_cast<size_t>(choices) * hidden + shared);
  float *h = memory.take(width), *scores = memory.take(experts);
  uint8_t* codes = bytes.take(width);
  Part parts[kMostChoices + 1];
  for (int k = 0; k < count; k++) {
    parts[k].hidden = k < choices ? hidden : shared;
    parts[k].h = memory.take(parts[k].hidden);
    parts[k].rows.codes[0] = parts[k].codes = bytes.take(parts[k].hidden);
    parts[k].rows.count = 1;
  }
  parts[choices].weights = c.shared;
  float* products = memory.take(slots * columns);

  Rows row;
  row.codes[0] = codes, row.count = 1;
  isa.norm(c.x, c.norm, width, s.epsilon, h);
  isa.quantize(h, width, codes, row.zero, row.inverse);

  Pool& pool = Pool::instance();
  // Columns of a first product, in `of` runs.
  const auto up = [&](const Part& part, int run, int of, int slot) {
    const int groups = part.hidden / kColumns, g = groups * run / of, n = groups * (run + 1) / of - g;
    gate_up(isa, part.weights, width, part.hidden, e.activation, row, g, n, products + slot * columns, part.h, 0);
  };
  const int rows = (experts + kRouterRows - 1) / kRouterRows;
  const int first = shared ? column_runs(threads, 1, shared / kColumns) : 0;
  pool.run(rows + first, threads, [&](int item, int slot) {
    if (item >= rows) return up(parts[choices], item - rows, first, slot);
    const int begin = item * kRouterRows;
    isa.score(h, c.router + static_cast<size_t>(begin) * width, std::min(kRouterRows, experts - begin), width,
              scores + begin);
  });
  int32_t ids[kMostChoices];
  float shares[kMostChoices + 1];
  isa.choose(s.route, scores, c.bias, ids, shares);
  shares[choices] = 1;
  for (int k = 0; k < choices; k++) parts[k].weights = c.bank + ids[k] * expert_bytes(e);

  const int second = column_runs(threads, choices, hidden / kColumns);
  pool.run(choices * second, threads,
           [&](int item, int slot) { up(parts[item / second], item % second, second, slot); });
  for (int k = 0; k < count; k++)
    isa.quantize(parts[k].h, parts[k].hidden, parts[k].codes, parts[k].rows.zero, parts[k].rows.inverse);

  const int groups = width / kColumns, third = column_runs(threads, 1, groups);
  pool.run(third, threads, [&](int item, int slot) {
    const int g = groups * item / third, n = groups * (item + 1) / third - g, at = g * kColumns, size = n * kColumns;
    const float* terms[kMostChoices + 1];
    for (int k = 0; k < count; k++) {
      const Part& part = parts[k];
      const uint8_t* down = part.weights + matrix_bytes(2 * part.hidden, width) + g * group_bytes(part.hidden);
      float* to = products + slot * columns + k * size;
      isa.multiply(down, n, part.hidden, part.rows, to, size);
      terms[k] = to;
    }
    isa.combine(terms, shares, count, size, c.y + at);
    add(isa, c.x + at, size, c.y + at);
  });
}

}  // namespace moe_jax
