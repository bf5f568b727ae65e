// Draws of next tokens: what jaxinfer/sampling.py documents, of one row at a time.
//
// A score is a logit and Gumbel noise, and the highest of those that are kept is the draw. No noise is made where it
// could not reach the highest until now, which of a trained model's logits is nearly everywhere. What top-k keeps is
// found by selection; within top-p, turns as sampling.first_likely has them, over what is left from turn to turn.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "noise.h"
#include "parallel.h"
#include "vectors.h"

constexpr int64_t kPiece = 64;  // tokens of which the largest logit is kept: less than that is not looked at
constexpr int kAtOnce = 4;      // vectors of noise that are made

struct Row {
  const float* logits;  // [vocab_size]
  int64_t vocab_size;
  float temperature;    // 0: the likeliest
  int32_t top_k;        // 0 keeps all
  float top_p, min_p;   // 1 and 0 keep all
  uint32_t seed, position;
};

// A vector of logits of which `left` are there, behind which there is nothing that could be drawn.
inline Vec load_or_nothing(const float* logits, int64_t left) {
  if (left >= kLanes) return load(logits);
  Vec out = broadcast(-kInfinity);
  for (int64_t i = 0; i < left; i++) out[i] = logits[i];
  return out;
}

struct Peak {
  float value = -kInfinity;
  int32_t first = 0;  // token that has it
  bool has_nan = false;
};

inline Peak find_peak(const float* logits, int64_t size) {
  Peak peak;
  IntVec nan{};
  for (int64_t begin = 0; begin < size; begin += kPiece) {
    const int64_t end = std::min(size, begin + kPiece);
    Vec top = broadcast(-kInfinity);
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vec x = load_or_nothing(logits + i, end - i);
      nan |= x != x;
      top = x > top ? x : top;
    }
    if (const float value = largest(top); value > peak.value) peak.value = value, peak.first = begin;
  }
  for (int i = 0; i < kLanes; i++) peak.has_nan |= nan[i] != 0;
  while (peak.first < size - 1 && logits[peak.first] != peak.value) peak.first++;
  return peak;
}

class DrawTask {
 public:
  int32_t run(const Row& row) {
    const Peak peak = find_peak(row.logits, row.vocab_size);
    if (!(row.temperature > 0) || peak.has_nan || !std::isfinite(peak.value)) return peak.first;
    row_ = row;
    scale(peak.value);
    if (row.top_k > 0 && row.top_k < row.vocab_size) keep([least = kth_largest()](float x) { return x >= least; });
    return row.top_p < 1 ? draw_within_top_p() : find_best().token;
  }

 private:
  struct Best {
    float score = -kInfinity, logit = -kInfinity;
    int32_t token = 0;
  };

  // Logits with the temperature, below the largest, so that one near 0 drives all others to -inf and none to inf.
  void scale(float highest) {
    is_whole_ = true, size_ = row_.vocab_size;
    const int64_t num_pieces = round_up(size_, kPiece) / kPiece;
    values_.resize(num_pieces * kPiece), tops_.resize(num_pieces);
    const float bound = std::log(row_.min_p);
    for (int64_t piece = 0; piece < num_pieces; piece++) {
      Vec top = broadcast(-kInfinity);
      for (int64_t i = piece * kPiece; i < (piece + 1) * kPiece; i += kLanes) {
        Vec scaled = (load_or_nothing(row_.logits + i, size_ - i) - highest) / row_.temperature;
        scaled = scaled < bound ? broadcast(-kInfinity) : scaled;
        top = scaled > top ? scaled : top;
        store(&values_[i], scaled);
      }
      tops_[piece] = largest(top);
    }
  }

  // Of the row's values the top_k-th: that of the pieces' largest is no higher, and few are above it.
  float kth_largest() {
    const int64_t k = row_.top_k;
    const auto kth = [this, k] {
      std::nth_element(sought_.begin(), sought_.begin() + (k - 1), sought_.end(), std::greater<float>());
      return sought_[k - 1];
    };
    float least = -kInfinity;
    if (static_cast<int64_t>(tops_.size()) >= k) {
      sought_ = tops_;
      least = kth();
    }
    sought_.clear();
    for (size_t piece = 0; piece < tops_.size(); piece++) {
      if (tops_[piece] < least) continue;
      for (int64_t i = piece * kPiece; i < std::min<int64_t>(size_, (piece + 1) * kPiece); i++) {
        if (values_[i] >= least) sought_.push_back(values_[i]);
      }
    }
    return kth();
  }

  // Drops what `is_kept` does not want of the values; all that is dropped is lower than what is not.
  template <typename Kept>
  void keep(const Kept& is_kept) {
    if (is_whole_) tokens_.resize(values_.size());
    int64_t size = 0;
    for (int64_t begin = 0; begin < size_; begin += kPiece) {
      if (is_whole_ && !is_kept(tops_[begin / kPiece])) continue;
      for (int64_t i = begin; i < std::min(size_, begin + kPiece); i++) {
        const float value = values_[i];
        tokens_[size] = is_whole_ ? i : tokens_[i];
        values_[size] = value;
        size += is_kept(value);
      }
    }
    is_whole_ = false, size_ = size;
    for (; size % kPiece; size++) values_[size] = -kInfinity, tokens_[size] = 0;
  }

  int32_t draw_within_top_p() {
    // At least 1e-30: what is above the likeliest has a mass of 0, and that has to be less.
    const float enough = std::max(row_.top_p * masses_above(-kInfinity, -kInfinity).first, 1e-30f);
    for (float ceiling = 0;;) {
      const Best best = find_best();
      const float between = (best.logit + ceiling) / 2;
      const auto [mass, mass_between] = masses_above(best.logit, between);
      if (mass < enough) return best.token;
      const bool is_above = mass_between >= enough;
      keep([floor = is_above ? between : best.logit](float x) { return x > floor; });
      if (!is_above) ceiling = between;
    }
  }

  // Of what is likelier than each.
  std::pair<float, float> masses_above(float first, float second) const {
    double masses[2] = {};
    for (int64_t begin = 0; begin < size_; begin += kPiece) {
      if (is_whole_ && tops_[begin / kPiece] <= first && tops_[begin / kPiece] <= second) continue;
      Vec above_first{}, above_second{};
      for (int64_t i = begin; i < begin + kPiece; i += kLanes) {
        const Vec x = load(&values_[i]), mass = exp_of_negative(x);
        above_first += x > first ? mass : Vec{};
        above_second += x > second ? mass : Vec{};
      }
      masses[0] += sum(above_first), masses[1] += sum(above_second);
    }
    return {masses[0], masses[1]};
  }

  // The highest score; of the lowest token that has it.
  Best find_best() const {
    Vec scores = broadcast(-kInfinity), logits = scores;
    BitVec tokens{};
    float highest = -kInfinity;
    uint32_t least_bits = 0;  // that could make a score as high of the largest logit, which is 0
    for (int64_t begin = 0; begin < size_; begin += kPiece) {
      if (is_whole_ && tops_[begin / kPiece] + kMostNoise < highest) continue;
      bool is_new = false;
      for (int64_t i = begin; i < begin + kPiece; i += kAtOnce * kLanes) {
        BitVec token[kAtOnce], bits[kAtOnce];
        IntVec may_be_best{};
        for (int n = 0; n < kAtOnce; n++) {
          bits[n] = token[n] = is_whole_ ? count_from(i + n * kLanes) : load(&tokens_[i + n * kLanes]);
        }
        threefry(row_.seed, row_.position, bits);
        for (int n = 0; n < kAtOnce; n++) may_be_best |= bits[n] >= least_bits;
        if (!any(may_be_best)) continue;
        is_new = true;
        for (int n = 0; n < kAtOnce; n++) {
          const Vec logit = load(&values_[i + n * kLanes]), score = logit + gumbel(bits[n]);
          const IntVec is_better = score > scores;
          scores = is_better ? score : scores;
          logits = is_better ? logit : logits;
          tokens = is_better ? token[n] : tokens;
        }
      }
      if (!is_new) continue;
      if (const float now = largest(scores); now > highest) highest = now, least_bits = bits_of(now);
    }
    Best best;
    for (int i = 0; i < kLanes; i++) {
      const int32_t token = tokens[i];
      if (scores[i] > best.score || (scores[i] == best.score && token < best.token)) {
        best = {scores[i], logits[i], token};
      }
    }
    return best;
  }

  Row row_;
  bool is_whole_;                           // nothing is dropped: a value's place is its token
  int64_t size_;                            // of what is left; behind it, up to whole pieces, values are -inf
  std::vector<float> values_, tops_;        // [size_], [size_ / kPiece]: largest of a piece, while all is there
  std::vector<uint32_t> tokens_;            // [size_]
  std::vector<float> sought_;
};

inline void draw_all(xla::ffi::ThreadPool& pool, const std::vector<Row>& rows, int32_t* tokens) {
  parallel_for(pool, rows.size(), [&](int64_t i) {
    thread_local DrawTask task;  // keeps its memory
    tokens[i] = task.run(rows[i]);
  });
}
