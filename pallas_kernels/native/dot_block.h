// The scores of a block of cached tokens: products of queries with their keys.
//
// A few queries go over the keys where they lie. More of them go over columns: the keys of a block, transposed once for
// all of them. Both sum in the same order.
#pragma once

#include "transpose.h"

constexpr int kBlock = 64;  // tokens of a sequence that are attended over at once: their keys stay in the first cache
constexpr int kFewQueries = 8;  // up to so many, transposing costs more than it saves

// The products of a query [dim], zeros behind it up to whole vectors, with as many keys as a vector has lanes.
template <typename C>
Vec dot_each(const float* query, const C* keys, const int64_t* places, int64_t dim) {
  const C* key[kLanes];
  for (int i = 0; i < kLanes; i++) key[i] = keys + places[i] * dim;
  Vec sums[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) {
    const Vec x = load(query + c);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) sums[i] += x * load(key[i] + c);
  }
  if (c < dim) {
    const Vec x = load(query + c);
    for (int i = 0; i < kLanes; i++) sums[i] += x * load_first(key[i] + c, dim - c);
  }
  return sum_each(sums);
}

// As many keys as a vector has lanes, as columns: out [dim, kBlock], zeros below it up to whole vectors.
template <typename C>
void transpose_keys(const C* keys, const int64_t* places, int64_t dim, float* out) {
  const C* key[kLanes];
  for (int i = 0; i < kLanes; i++) key[i] = keys + places[i] * dim;
  transpose_rows(key, dim, kBlock, out);
}

// [R queries, N vectors of keys]
template <int R, int N>
struct Dots {
  Vec of[R][N];
};

// The sums over the numbers that lie in `num_lanes` lanes of their vectors, `lane` and those behind it. What a lane has
// is summed first, and then as `sum_each` does it: no bit is another than in `dot_each`.
template <int R, int N, int num_lanes>
__attribute__((always_inline)) inline Dots<R, N> dot_lanes(const float* queries, int64_t q_stride, const float* keys,
                                                           int64_t lane) {
  Dots<R, N> dots{};
  if constexpr (num_lanes == 1) {
    for (int64_t c = lane; c < q_stride; c += kLanes) {
      Vec key[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) key[n] = load(keys + c * kBlock + n * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const Vec x = broadcast(queries[r * q_stride + c]);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) dots.of[r][n] += x * key[n];
      }
    }
  } else {
    const auto a = dot_lanes<R, N, num_lanes / 2>(queries, q_stride, keys, lane);
    const auto b = dot_lanes<R, N, num_lanes / 2>(queries, q_stride, keys, lane + num_lanes / 2);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) dots.of[r][n] = a.of[r][n] + b.of[r][n];
    }
  }
  return dots;
}

template <int R, int N>
void dot_rows(const float* queries, int64_t q_stride, const float* keys, float* scores) {
  const auto dots = dot_lanes<R, N, kLanes>(queries, q_stride, keys, 0);
  for (int r = 0; r < R; r++) {
    for (int n = 0; n < N; n++) store(scores + r * kBlock + n * kLanes, dots.of[r][n]);
  }
}

template <int R>
void dot_columns(const float* queries, int64_t q_stride, const float* keys, int64_t count, float* scores) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) dot_rows<R, 2>(queries, q_stride, keys + i, scores + i);
  if (i < count) dot_rows<R, 1>(queries, q_stride, keys + i, scores + i);
}

// The products of queries [num_rows, q_stride] with `count` keys as `transpose_keys` leaves them -> [num_rows, kBlock].
inline void dot_all(const float* queries, int64_t num_rows, int64_t q_stride, const float* keys, int64_t count,
                    float* scores) {
  int64_t row = 0;
  const auto next = [&](auto dots, int64_t rows) {
    for (; row + rows <= num_rows; row += rows) {
      dots(queries + row * q_stride, q_stride, keys, count, scores + row * kBlock);
    }
  };
  next(dot_columns<4>, 4), next(dot_columns<1>, 1);
}
