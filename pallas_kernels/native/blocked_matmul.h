// Many vectors times a weight stored [out, in], as fast as the processor multiplies.
//
// A panel is a few rows of the weight, as columns: transposed once for all vectors, block by block of what is summed
// over. A few vectors at a time go over a block; their sums stay in registers (Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication", 2008).
#pragma once

#include <algorithm>
#include <vector>

#include "product.h"
#include "transpose.h"

constexpr int64_t kPanelVectors = 3;  // of a panel's columns
constexpr int64_t kPanel = kPanelVectors * kLanes;
constexpr int64_t kDepth = 1024;  // of a block
constexpr int kMostRows = kLanes == 16 ? 8 : 4;  // of x that go over a block at once: AVX-512 has 32 registers

// Rows [first, last) of the weight, at [begin, begin + depth) of each -> panel [depth, kPanel]. The last row fills up a
// vector, and zeros are below the panel up to whole vectors.
template <typename W>
void pack(const Product<W>& call, int64_t first, int64_t last, int64_t begin, int64_t depth, float* panel) {
  for (int64_t n = 0; n < round_up(last - first, kLanes); n += kLanes) {
    const W* rows[kLanes];
    for (int i = 0; i < kLanes; i++) rows[i] = call.weight + std::min(first + n + i, last - 1) * call.in + begin;
    transpose_rows(rows, depth, kPanel, panel + n);
  }
}

// x [R, depth] times N vectors of a panel's columns -> tile [R, kPanel]. R * N sums and N vectors fit into registers.
template <int R, int N>
void multiply_tile(const float* x, int64_t x_stride, const float* panel, int64_t depth, float* tile) {
  Vec sums[R][N] = {};
  for (int64_t k = 0; k < depth; k++) {
    Vec column[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) column[n] = load(panel + k * kPanel + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec of_x = broadcast(x[r * x_stride + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[r][n] += of_x * column[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(tile + r * kPanel + n * kLanes, sums[r][n]);
  }
}

inline void add_to(float* y, const float* sums, int64_t size, bool is_first) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(y + i, is_first ? load(sums + i) : load(y + i) + load(sums + i));
  const int64_t left = size - i;
  if (left) store_first(y + i, is_first ? load(sums + i) : load_first(y + i, left) + load(sums + i), left);
}

// The part of y [num_rows, out] that is rows [first, last) of the weight's: what a block, which begins at `begin` of
// what is summed over, adds to it.
template <int N, typename W>
void multiply_block(const Product<W>& call, int64_t first, int64_t last, int64_t begin, int64_t depth,
                    const float* panel) {
  float tile[kMostRows * kPanel];
  int64_t row = 0;
  const auto next = [&](auto multiply, int64_t rows) {
    for (; row + rows <= call.num_rows; row += rows) {
      multiply(call.x + row * call.in + begin, call.in, panel, depth, tile);
      for (int64_t r = 0; r < rows; r++) {
        add_to(call.y + (row + r) * call.out + first, tile + r * kPanel, last - first, begin == 0);
      }
    }
  };
  next(multiply_tile<kMostRows, N>, kMostRows), next(multiply_tile<1, N>, 1);
}

template <typename W>
int64_t num_panels(const Product<W>& call) {
  return round_up(call.out, kPanel) / kPanel;
}

template <typename W>
void multiply_panel(const Product<W>& call, int64_t index) {
  thread_local std::vector<float> panel;
  panel.resize((kDepth + kLanes) * kPanel);
  const int64_t first = index * kPanel, last = std::min(call.out, first + kPanel);
  const auto multiply = last - first > 2 * kLanes ? multiply_block<3, W>
                        : last - first > kLanes   ? multiply_block<2, W>
                                                  : multiply_block<1, W>;
  for (int64_t begin = 0; begin < call.in; begin += kDepth) {
    const int64_t depth = std::min(kDepth, call.in - begin);
    pack(call, first, last, begin, depth, panel.data());
    multiply(call, first, last, begin, depth, panel.data());
  }
}
