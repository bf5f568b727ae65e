// A block of cached tokens, as one query or two sees it: scores, weights, and the weighted sum of values.
#pragma once

#include <cmath>

#include "vectors.h"

constexpr int kBlock = 64;  // tokens of a sequence that are attended over at once: their keys stay in the first cache

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

// Of one query, over the blocks until now.
struct Seen {
  float largest = -kInfinity;  // score
  float total = 0;             // of the weights, in units of the largest
};

// The scores [0, count) of a block become weights, those outside of [begin, end) zero. Returns what is left of the
// weights until now: their unit is another.
inline float to_weights(float* scores, int64_t count, int64_t begin, int64_t end, Seen& seen) {
  float largest = seen.largest;
  for (int64_t i = begin; i < end; i++) largest = scores[i] > largest ? scores[i] : largest;
  const float unit = largest == -kInfinity ? 0 : largest;  // all scores are so, or NaN
  for (int64_t i = 0; i < begin; i++) scores[i] = -kInfinity;
  for (int64_t i = end; i < count; i++) scores[i] = -kInfinity;
  Vec total{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec weights = exp_of_negative(load(scores + i) - unit);
    total += weights;
    store(scores + i, weights);
  }
  const float kept = std::exp(seen.largest - unit);
  seen = {largest, seen.total * kept + sum(total)};
  return kept;
}

// A block's tokens whose values count, and where these lie: values + places[i] * stride.
template <typename C>
struct Values {
  const C* values;
  const int64_t* places;
  int64_t stride, begin, end;
};

// N vectors of outs[r] += the values, each times weights[r], for R queries.
template <int R, int N, typename C>
void add_vectors(float* outs, int64_t out_stride, const float* weights, const Values<C>& of, int64_t first) {
  Vec sums[R][N];
  for (int r = 0; r < R; r++) {
    for (int n = 0; n < N; n++) sums[r][n] = load(outs + r * out_stride + first + n * kLanes);
  }
  for (int64_t i = of.begin; i < of.end; i++) {
    const C* value = of.values + of.places[i] * of.stride + first;
    Vec weight[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) weight[r] = broadcast(weights[r * kBlock + i]);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const Vec x = load(value + n * kLanes);
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) sums[r][n] += weight[r] * x;
    }
  }
  for (int r = 0; r < R; r++) {
    for (int n = 0; n < N; n++) store(outs + r * out_stride + first + n * kLanes, sums[r][n]);
  }
}

// The same of all `dim` numbers. outs [R, out_stride] has whole vectors, weights are [R, kBlock].
template <int R, typename C>
void add_values(float* outs, int64_t out_stride, const float* weights, const Values<C>& of, int64_t dim) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= dim; c += 4 * kLanes) add_vectors<R, 4>(outs, out_stride, weights, of, c);
  for (; c + kLanes <= dim; c += kLanes) add_vectors<R, 1>(outs, out_stride, weights, of, c);
  if (c == dim) return;
  for (int r = 0; r < R; r++) {
    Vec out = load(outs + r * out_stride + c);
    for (int64_t i = of.begin; i < of.end; i++) {
      out += weights[r * kBlock + i] * load_first(of.values + of.places[i] * of.stride + c, dim - c);
    }
    store(outs + r * out_stride + c, out);
  }
}
