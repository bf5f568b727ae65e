// Rows that become columns, so that one vector has the same number of many of them.
#pragma once

#include "vectors.h"

inline void transpose(Vec* rows) {
#pragma GCC unroll 4
  for (int n = kLanes; n > 1; n /= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++) {
      next[i] = evens(rows[2 * i], rows[2 * i + 1]);
      next[kLanes / 2 + i] = odds(rows[2 * i], rows[2 * i + 1]);
    }
    memcpy(rows, next, sizeof next);
  }
}

// Rows of `size` numbers, as many as a vector has lanes -> columns [size, stride], zeros below them up to whole vectors.
template <typename T>
void transpose_rows(const T* const* rows, int64_t size, int64_t stride, float* columns) {
  for (int64_t c = 0; c < size; c += kLanes) {
    Vec block[kLanes];
    for (int i = 0; i < kLanes; i++) block[i] = c + kLanes <= size ? load(rows[i] + c) : load_first(rows[i] + c, size - c);
    transpose(block);
    for (int i = 0; i < kLanes; i++) store(columns + (c + i) * stride, block[i]);
  }
}
