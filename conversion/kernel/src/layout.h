// How INT4 weights lie in a file for the kernel: conversion/litert/bank.py, in C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace moe_jax {

// Rows of a weight are stored in groups of 16, each with 16 float sums, then bf16 scales, then nibbles.
constexpr int kColumns = 16, kBlock = 32;

inline size_t group_bytes(size_t inputs) { return 64 + inputs / kBlock * (32 + 256); }

// Bytes of a weight [outputs, inputs].
inline size_t matrix_bytes(size_t outputs, size_t inputs) { return outputs / kColumns * group_bytes(inputs); }

inline float bfloat16(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Code of input i of a block, row c of its group.
inline int nibble(const uint8_t* block, int c, int i) {
  const uint8_t pair = block[64 * (i / 8) + 4 * c + i % 4];
  return static_cast<int8_t>(i % 8 < 4 ? pair << 4 : pair & 0xF0) >> 4;
}

}  // namespace moe_jax
