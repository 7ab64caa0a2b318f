// The functions of one path that are the same on all, compiled for `target` with `lanes` lanes.
#pragma once

#include "attention_rows.h"
#include "rows.h"

#define MOE_JAX_ROWS(target, lanes)                                                                    \
  target void quantize(const float* x, int n, uint8_t* codes, float* zero, float* inverse) {           \
    RowWork<lanes>::quantize(x, n, codes, zero, inverse);                                              \
  }                                                                                                    \
  target void gate(const float* g, const float* up, int n, uint32_t activation, float* h) {            \
    RowWork<lanes>::gate(g, up, n, activation, h);                                                     \
  }                                                                                                    \
  target void combine(const float* const* terms, const float* weights, int count, int n, float* y) {   \
    RowWork<lanes>::combine(terms, weights, count, n, y);                                              \
  }                                                                                                    \
  target void norm(const float* x, const float* weight, int n, float epsilon, float* y) {              \
    RowWork<lanes>::norm(x, weight, n, epsilon, y);                                                    \
  }                                                                                                    \
  target void rotate(const float* x, const float* cosines, const float* sines, int n, float epsilon, float* y) { \
    RowWork<lanes>::rotate(x, cosines, sines, n, epsilon, y);                                          \
  }                                                                                                    \
  target void score(const float* x, const float* weight, int count, int n, float* scores) {            \
    RowWork<lanes>::score(x, weight, count, n, scores);                                                \
  }                                                                                                    \
  target void choose(const RouteShape& s, float* scores, const float* bias, int32_t* ids, float* shares) { \
    RowWork<lanes>::choose(s, scores, bias, ids, shares);                                              \
  }                                                                                                    \
  target void attend(const Piece& piece) { AttentionWork<lanes>::attend(piece); }                      \
  target void merge(const float* outs, const float* most, const float* sums, int count, int step, int n, float* y) { \
    AttentionWork<lanes>::merge(outs, most, sums, count, step, n, y);                                  \
  }
// In the order of `Isa`.
#define MOE_JAX_PATH(of, multiply)                                                                     \
  of quantize, multiply, of gate, of combine, of norm, of rotate, of score, of choose, of attend, of merge
