// Paged attention for CPUs: what paged_attention/xla.py documents, of any tokens of any sequences.
//
// A tile is a few consecutive tokens of a sequence; a task, the query heads of a tile that read one KV head. It goes
// over the tokens that the tile sees block by block with a running softmax (Milakov and Gimelshein, arXiv:1805.02867),
// and reads keys and values from the pages where they are. Blocks begin at multiples of kBlock, so what comes out for a
// query does not depend on which other tokens are in its tile.

#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "softmax_block.h"

constexpr int kTileRows = 64;  // queries, tokens times heads, that a task has at most, unless a token has more

// C is the type of what the cache holds.
template <typename C>
struct Attention {
  const float* q;            // [S, N, H]
  const C *keys, *values;    // [P, K, page_size, H]; the same where values are the first numbers of the keys
  const float *key_scales, *value_scales;  // [P, K, page_size], or null
  const float* sinks;        // [N], or null
  float* out;                // [S, N, V]
  int64_t num_heads, num_kv_heads, key_dim, value_dim, value_stride, page_size;
  int64_t window;            // 0: all
  float scale, soft_cap;     // 0: none

  int64_t group() const { return num_heads / num_kv_heads; }

  // The first position that a query at `position` sees.
  int64_t first_seen(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
};

struct Tile {
  int64_t token, num_tokens, position;  // of the first
  const int32_t* table;
};

template <typename C>
class AttentionTask {
 public:
  void run(const Attention<C>& call, const Tile& tile, int64_t kv_head) {
    call_ = &call, tile_ = tile, kv_head_ = kv_head, num_rows_ = tile.num_tokens * call.group();
    q_stride_ = round_up(call.key_dim, kLanes), out_stride_ = round_up(call.value_dim, kLanes);
    start();
    const int64_t last = tile.position + tile.num_tokens - 1, first = call.first_seen(tile.position);
    for (int64_t block = first / kBlock * kBlock; block <= last; block += kBlock) {
      const int64_t count = round_up(std::min<int64_t>(kBlock, last + 1 - block), kLanes);
      find(block, count, first, last);
      score(count);
      weigh(count);
      add_all();
    }
    finish();
  }

 private:
  int64_t head(int64_t row) const { return kv_head_ * call_->group() + row % call_->group(); }

  // Where a row's numbers begin in [S, N, dim].
  int64_t offset(int64_t row, int64_t dim) const {
    return ((tile_.token + row / call_->group()) * call_->num_heads + head(row)) * dim;
  }

  void start() {
    const int64_t num_seen = round_up(num_rows_, kLanes) / kLanes;
    queries_.assign(num_rows_ * q_stride_, 0);
    columns_.resize(q_stride_ * kBlock);
    outs_.assign(num_rows_ * out_stride_, 0);
    scores_.resize(num_rows_ * kBlock);
    ranges_.resize(num_rows_);
    seen_.assign(num_seen, Seen{broadcast(-kInfinity), Vec{}});
    for (int64_t row = 0; row < num_rows_; row++) {
      const float* query = call_->q + offset(row, call_->key_dim);
      for (int64_t c = 0; c < call_->key_dim; c++) queries_[row * q_stride_ + c] = query[c] * call_->scale;
      if (call_->sinks) {  // a score that was seen before all others
        seen_[row / kLanes].largest[row % kLanes] = call_->sinks[head(row)];
        seen_[row / kLanes].total[row % kLanes] = 1;
      }
    }
  }

  // Where a block's tokens are, and which of them a row sees. What no query of the tile sees may hold anything, so
  // something else is read for it.
  void find(int64_t block, int64_t count, int64_t first, int64_t last) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t position = std::min(std::max(block + i, first), last);
      const int64_t page = tile_.table[position / call_->page_size] * call_->num_kv_heads + kv_head_;
      places_[i] = page * call_->page_size + position % call_->page_size;
      if (call_->key_scales) {
        key_scales_[i] = call_->key_scales[places_[i]];
        value_scales_[i] = call_->value_scales[places_[i]];
      }
    }
    for (int64_t row = 0; row < num_rows_; row++) {
      const int64_t position = tile_.position + row / call_->group();
      const int64_t begin = std::max<int64_t>(0, call_->first_seen(position) - block);
      ranges_[row] = {begin, std::max(begin, std::min<int64_t>(count, position + 1 - block))};
    }
  }

  void score(int64_t count) {
    if (num_rows_ <= kFewQueries) {
      for (int64_t i = 0; i < count; i += kLanes) {
        for (int64_t row = 0; row < num_rows_; row++) {
          store(&scores_[row * kBlock + i],
                dot_each(&queries_[row * q_stride_], call_->keys, places_ + i, call_->key_dim));
        }
      }
    } else {
      for (int64_t i = 0; i < count; i += kLanes) {
        transpose_keys(call_->keys, places_ + i, call_->key_dim, &columns_[i]);
      }
      dot_all(queries_.data(), num_rows_, q_stride_, columns_.data(), count, scores_.data());
    }
    if (call_->key_scales) scale_scores(key_scales_, count);
    if (const float cap = call_->soft_cap) {
      change_scores(count, [cap](Vec scores, int64_t) { return cap * tanh_of(scores / cap); });
    }
  }

  template <typename Change>
  void change_scores(int64_t count, const Change& change) {
    for (int64_t row = 0; row < num_rows_; row++) {
      for (int64_t i = 0; i < count; i += kLanes) {
        float* scores = &scores_[row * kBlock + i];
        store(scores, change(load(scores), i));
      }
    }
  }

  void scale_scores(const float* scales, int64_t count) {
    change_scores(count, [scales](Vec scores, int64_t i) { return scores * load(scales + i); });
  }

  // Scores become weights, and what was seen until now is put into their units.
  void weigh(int64_t count) {
    for (int64_t first = 0; first < num_rows_; first += kLanes) {
      const int64_t num_rows = std::min<int64_t>(kLanes, num_rows_ - first);
      float kept[kLanes];
      store(kept, to_weights(&scores_[first * kBlock], num_rows, count, &ranges_[first], seen_[first / kLanes]));
      for (int64_t r = 0; r < num_rows; r++) {
        float* out = &outs_[(first + r) * out_stride_];
        for (int64_t c = 0; c < out_stride_; c += kLanes) store(out + c, load(out + c) * kept[r]);
      }
    }
    if (call_->value_scales) scale_scores(value_scales_, count);
  }

  // Rows that see the same of a block take its values together.
  void add_all() {
    for (int64_t row = 0, end; row < num_rows_; row = end) {
      const Range range = ranges_[row];
      for (end = row + 1; end < num_rows_ && ranges_[end] == range;) end++;
      const Values<C> values{call_->values, places_, call_->value_stride, range};
      row = add_while<4>(row, end, values);
      row = add_while<2>(row, end, values);
      add_while<1>(row, end, values);
    }
  }

  // R rows at once, as long as there are so many. Returns the first that is left.
  template <int R>
  int64_t add_while(int64_t row, int64_t end, const Values<C>& values) {
    for (; row + R <= end; row += R) {
      add_values<R>(&outs_[row * out_stride_], out_stride_, &scores_[row * kBlock], values, call_->value_dim);
    }
    return row;
  }

  void finish() {
    for (int64_t row = 0; row < num_rows_; row++) {
      const float total = seen_[row / kLanes].total[row % kLanes];
      float* out = call_->out + offset(row, call_->value_dim);
      for (int64_t c = 0; c < call_->value_dim; c++) out[c] = total == 0 ? 0 : outs_[row * out_stride_ + c] / total;
    }
  }

  const Attention<C>* call_;
  Tile tile_;
  int64_t kv_head_, num_rows_, q_stride_, out_stride_;
  std::vector<float> queries_, outs_, scores_;  // [rows, q_stride], [rows, out_stride], [rows, kBlock]
  std::vector<float> columns_;                  // [q_stride, kBlock]: the keys of a block
  std::vector<Range> ranges_;                   // [rows]
  std::vector<Seen> seen_;                      // [rows, up to whole vectors of them]
  int64_t places_[kBlock];                      // in units of one token of one KV head
  float key_scales_[kBlock], value_scales_[kBlock];
};

// Consecutive tokens of a sequence at consecutive positions, at most `most_tokens` of them; none of padding.
inline std::vector<Tile> make_tiles(const int32_t* tables, int64_t table_width, const int32_t* sequences,
                                    const int32_t* positions, int64_t num_tokens, int64_t most_tokens) {
  std::vector<Tile> tiles;
  for (int64_t token = 0; token < num_tokens; token++) {
    if (positions[token] < 0) continue;
    const int32_t* table = tables + sequences[token] * table_width;
    if (!tiles.empty()) {
      Tile& tile = tiles.back();
      const bool follows = tile.token + tile.num_tokens == token && tile.table == table &&
                           tile.position + tile.num_tokens == positions[token];
      if (follows && tile.num_tokens < most_tokens) {
        tile.num_tokens++;
        continue;
      }
    }
    tiles.push_back({token, 1, positions[token], table});
  }
  return tiles;
}

template <typename C>
void attend(xla::ffi::ThreadPool& pool, const Attention<C>& call, const std::vector<Tile>& tiles) {
  parallel_for(pool, tiles.size() * call.num_kv_heads, [&](int64_t i) {
    thread_local AttentionTask<C> task;  // keeps its memory
    const int64_t of_last = tiles.size() - 1 - i / call.num_kv_heads;  // a prompt's last tile has most to do
    task.run(call, tiles[of_last], i % call.num_kv_heads);
  });
}
