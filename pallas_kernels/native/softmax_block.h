// A block of cached tokens, as queries see it: scores become weights, and these sum its values.
#pragma once

#include "dot_block.h"

// The first positions of a block that a query sees none of, and the first behind those that it sees.
struct Range {
  int64_t begin, end;

  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};

// Of as many queries as a vector has lanes, over the blocks until now.
struct Seen {
  Vec largest;  // score
  Vec total;    // of the weights, in units of the largest
};

// The largest of each of as many vectors as have lanes, none of it NaN. They are overwritten.
inline Vec largest_each(Vec* vectors) {
#pragma GCC unroll 16
  for (int n = kLanes / 2; n; n /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) {
      const Vec a = evens(vectors[2 * i], vectors[2 * i + 1]), b = odds(vectors[2 * i], vectors[2 * i + 1]);
      vectors[i] = a > b ? a : b;
    }
  }
  return vectors[0];
}

// The scores [num_rows, kBlock] of a block of `count` tokens become weights, which are 0 outside of each row's range.
// Returns what is left of the weights until now: their unit is another, unless the row sees nothing here.
inline Vec to_weights(float* scores, int64_t num_rows, int64_t count, const Range* ranges, Seen& seen) {
  Vec tops[kLanes], sums[kLanes] = {};
  for (int64_t r = 0; r < kLanes; r++) tops[r] = broadcast(-kInfinity);
  for (int64_t r = 0; r < num_rows; r++) {
    const uint32_t begin = ranges[r].begin, size = ranges[r].end - ranges[r].begin;
    for (int64_t i = 0; i < count; i += kLanes) {
      float* place = scores + r * kBlock + i;
      const Vec seen_scores = count_from(i) - begin < size ? load(place) : broadcast(-kInfinity);
      tops[r] = seen_scores > tops[r] ? seen_scores : tops[r];
      store(place, seen_scores);
    }
  }
  const Vec top = largest_each(tops), largest = top > seen.largest ? top : seen.largest;
  const Vec unit = largest == -kInfinity ? Vec{} : largest;  // all scores are so, or NaN
  float units[kLanes];
  store(units, unit);
  for (int64_t r = 0; r < num_rows; r++) {
    for (int64_t i = 0; i < count; i += kLanes) {
      float* place = scores + r * kBlock + i;
      const Vec weights = exp_of_negative(load(place) - units[r]);
      sums[r] += weights;
      store(place, weights);
    }
  }
  const Vec kept = exp_of_negative(seen.largest - unit);
  seen = {largest, seen.total * kept + sum_each(sums)};
  return kept;
}

// A block's tokens whose values count, and where these lie: values + places[i] * stride.
template <typename C>
struct Values {
  const C* values;
  const int64_t* places;
  int64_t stride;
  Range range;
};

// N vectors of outs[r] += the values, each times weights[r], for R queries.
template <int R, int N, typename C>
void add_vectors(float* outs, int64_t out_stride, const float* weights, const Values<C>& of, int64_t first) {
  Vec sums[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[r][n] = load(outs + r * out_stride + first + n * kLanes);
  }
  for (int64_t i = of.range.begin; i < of.range.end; i++) {
    const C* value = of.values + of.places[i] * of.stride + first;
    Vec weight[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) weight[r] = broadcast(weights[r * kBlock + i]);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const Vec x = load(value + n * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sums[r][n] += weight[r] * x;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
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
    for (int64_t i = of.range.begin; i < of.range.end; i++) {
      out += weights[r * kBlock + i] * load_first(of.values + of.places[i] * of.stride + c, dim - c);
    }
    store(outs + r * out_stride + c, out);
  }
}
