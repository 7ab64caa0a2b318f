// layer PATH THREADS INPUT OUTPUT: run one layer by a path ("best" for the best one) and write y.
//
// INPUT holds, one after the other: Shape, tokens (int32), x, ids, weights and the bank, as in `Call`.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

#include "experts.h"
#include "isa.h"

int main(int count, char** arguments) {
  if (count != 5) return std::fprintf(stderr, "usage: layer PATH THREADS INPUT OUTPUT\n"), 2;
  const moe_jax::Isa* isa = moe_jax::find_isa(std::strcmp(arguments[1], "best") ? arguments[1] : nullptr);
  if (!isa) return std::fprintf(stderr, "this processor has no path %s\n", arguments[1]), 3;
  std::ifstream in(arguments[3], std::ios::binary);
  const std::vector<char> input((std::istreambuf_iterator<char>(in)), {});
  if (input.size() < sizeof(moe_jax::Shape) + 4) return std::fprintf(stderr, "%s is too short\n", arguments[3]), 2;
  const char* at = input.data();
  const auto take = [&](size_t size) { return std::exchange(at, at + size); };
  moe_jax::Shape shape;
  std::memcpy(&shape, take(sizeof shape), sizeof shape);
  int32_t tokens;
  std::memcpy(&tokens, take(4), 4);
  const size_t width = shape.width, routed = static_cast<size_t>(tokens) * shape.choices;
  const auto* x = reinterpret_cast<const float*>(take(4 * tokens * width));
  const auto* ids = reinterpret_cast<const int32_t*>(take(4 * routed));
  const auto* weights = reinterpret_cast<const float*>(take(4 * routed));
  const auto* bank = reinterpret_cast<const uint8_t*>(take(shape.experts * expert_bytes(shape)));
  if (at != input.data() + input.size()) return std::fprintf(stderr, "%s has another size\n", arguments[3]), 2;
  std::vector<float> y(tokens * width);
  const moe_jax::Call call = {tokens, x, ids, weights, bank, y.data()};
  if (!moe_jax::run_experts(*isa, shape, call, std::atoi(arguments[2]))) return 1;
  std::ofstream out(arguments[4], std::ios::binary);
  out.write(reinterpret_cast<const char*>(y.data()), 4 * y.size());
  if (!out.flush()) return std::fprintf(stderr, "cannot write %s\n", arguments[4]), 1;
  std::puts(isa->name);
}
