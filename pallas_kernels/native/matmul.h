// A few vectors times a weight stored [out, in], which is read once, as fast as memory gives it.
//
// The threads take rows of the weight as they come to them: on a machine that has other work too, none waits for the
// slowest with a half of its own.
#pragma once

#include <algorithm>

#include "product.h"
#include "vectors.h"

constexpr int64_t kTaskBytes = 256 * 1024;  // of a weight

// Of M rows of x from `row` on, and R of the weight from `o` on.
template <int M, int R, typename W>
inline void multiply(const Product<W>& call, int64_t row, int64_t o) {
  constexpr int kNumSums = (M * R + kLanes - 1) / kLanes * kLanes;
  const int64_t in = call.in;
  const float* x = call.x + row * in;
  const W* weight = call.weight + o * in;
  Vec sums[kNumSums] = {};
  const auto add = [&](auto load_x, auto load_weight) {
    Vec of_weight[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) of_weight[r] = load_weight(weight + r * in);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const Vec of_x = load_x(x + m * in);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sums[m * R + r] += of_x * of_weight[r];
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    for (int r = 0; r < R; r++) __builtin_prefetch(weight + (R + r) * in + i);  // of the next rows
    add([i](const float* from) { return load(from + i); }, [i](const W* from) { return load(from + i); });
  }
  if (const int64_t left = in - i) {
    add([=](const float* from) { return load_first(from + i, left); },
        [=](const W* from) { return load_first(from + i, left); });
  }
  float results[kNumSums];
  for (int n = 0; n < kNumSums; n += kLanes) store(results + n, sum_each(sums + n));
  for (int m = 0; m < M; m++) {
    for (int r = 0; r < R; r++) call.y[(row + m) * call.out + o + r] = results[m * R + r];
  }
}

// Of M rows of x, and the weight's rows [first, last): R at a time, so that the sums of M * R fit into registers.
template <int M, int R, typename W>
void multiply_rows(const Product<W>& call, int64_t row, int64_t first, int64_t last) {
  int64_t o = first;
  for (; o + R <= last; o += R) multiply<M, R>(call, row, o);
  for (; o < last; o++) multiply<M, 1>(call, row, o);
}

// The rows of the weight that are a task's: as many as go at once, 2, 3 or 4 of them, again and again.
template <typename W>
int64_t rows_of_task(const Product<W>& call) {
  return round_up(kTaskBytes / (call.in * sizeof(W)) + 1, 12);
}

template <typename W>
void multiply_task(const Product<W>& call, int64_t task) {
  const int64_t of_task = rows_of_task(call), first = task * of_task, last = std::min(call.out, first + of_task);
  int64_t row = 0;
  for (; row + 8 <= call.num_rows; row += 8) multiply_rows<8, 3>(call, row, first, last);
  for (; row + 4 <= call.num_rows; row += 4) multiply_rows<4, 4>(call, row, first, last);
  for (; row + 2 <= call.num_rows; row += 2) multiply_rows<2, 4>(call, row, first, last);
  for (; row < call.num_rows; row++) multiply_rows<1, 2>(call, row, first, last);
}

template <typename W>
int64_t num_tasks(const Product<W>& call) {
  return (call.out + rows_of_task(call) - 1) / rows_of_task(call);
}
