// What XLA calls: the arrays that it gives, as the kernels take them.

#include <utility>
#include <vector>

#include "attention.h"
#include "blocked_matmul.h"
#include "draw.h"
#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int64_t kFewRows = 32;  // of x: with more, it pays to transpose the weight

const float* data_or_null(const ffi::Buffer<ffi::F32>& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}

// Scales and sinks are [0] where there are none.
ffi::Error paged_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                           ffi::Buffer<ffi::F32> key_scales, ffi::Buffer<ffi::F32> value_scales,
                           ffi::Buffer<ffi::F32> sinks, ffi::Buffer<ffi::S32> tables,
                           ffi::Buffer<ffi::S32> sequences, ffi::Buffer<ffi::S32> positions,
                           ffi::Result<ffi::Buffer<ffi::F32>> out, float scale, int64_t window, float soft_cap) {
  const auto of_queries = q.dimensions(), of_keys = keys.dimensions(), of_values = values.dimensions();
  const int64_t num_tokens = of_queries[0], num_heads = of_queries[1], num_kv_heads = of_keys[1];
  const int64_t most_tokens = std::max<int64_t>(1, kTileRows * num_kv_heads / num_heads);
  const auto tiles = make_tiles(tables.typed_data(), tables.dimensions()[1], sequences.typed_data(),
                                positions.typed_data(), num_tokens, most_tokens);
  memset(out->typed_data(), 0, out->size_bytes());  // of padding
  const auto of_type = [&](auto of_cache) {
    using C = decltype(of_cache);
    const auto* k = reinterpret_cast<const C*>(keys.untyped_data());
    const auto* v = reinterpret_cast<const C*>(values.untyped_data());
    const Attention<C> call{q.typed_data(), k, v, data_or_null(key_scales), data_or_null(value_scales),
                       data_or_null(sinks), out->typed_data(), num_heads, num_kv_heads, of_keys[3],
                       out->dimensions()[2], of_values[3], of_keys[2], window, scale, soft_cap};
    attend(pool, call, tiles);
    return ffi::Error::Success();
  };
  switch (keys.element_type()) {
    case ffi::F32: return of_type(float{});
    case ffi::BF16: return of_type(BFloat16{});
    case ffi::F16: return of_type(Float16{});
    case ffi::S8: return of_type(int8_t{});
    case ffi::F8E4M3FN: return of_type(Float8{});
    default: return ffi::Error::InvalidArgument("there is no code for pages of this type");
  }
}

// Of several weights at once: threads come together once for all of them. None of the products is empty.
template <typename W>
void multiply_all(ffi::ThreadPool& pool, const std::vector<Product<W>>& calls) {
  const bool is_few = calls[0].num_rows <= kFewRows;
  std::vector<std::pair<const Product<W>*, int64_t>> tasks;
  for (const Product<W>& call : calls) {
    for (int64_t i = 0; i < (is_few ? num_tasks(call) : num_panels(call)); i++) tasks.push_back({&call, i});
  }
  parallel_for(pool, tasks.size(), [&](int64_t i) {
    const auto [call, index] = tasks[i];
    is_few ? multiply_task(*call, index) : multiply_panel(*call, index);
  });
}

template <typename W>
ffi::Error multiply_by_each(ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& x, ffi::RemainingArgs weights,
                            ffi::RemainingRets products) {
  std::vector<Product<W>> calls;
  for (size_t i = 0; i < weights.size(); i++) {
    const auto weight = weights.get<ffi::AnyBuffer>(i);
    auto y = products.get<ffi::Buffer<ffi::F32>>(i);
    if (!weight.has_value()) return weight.error();
    if (!y.has_value()) return y.error();
    const auto sizes = weight->dimensions();
    calls.push_back({x.typed_data(), reinterpret_cast<const W*>(weight->untyped_data()), (*y)->typed_data(),
                     x.dimensions()[0], sizes[1], sizes[0]});
  }
  multiply_all(pool, calls);
  return ffi::Error::Success();
}

// Of x with each of the weights, which are of one type.
ffi::Error matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs weights,
                  ffi::RemainingRets products) {
  const auto first = weights.get<ffi::AnyBuffer>(0);
  if (!first.has_value()) return first.error();
  switch (first->element_type()) {
    case ffi::F32: return multiply_by_each<float>(pool, x, weights, products);
    case ffi::BF16: return multiply_by_each<BFloat16>(pool, x, weights, products);
    case ffi::F16: return multiply_by_each<Float16>(pool, x, weights, products);
    default: return ffi::Error::InvalidArgument("there is no code for weights of this type");
  }
}

ffi::Error draw(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::F32> temperature,
                ffi::Buffer<ffi::S32> top_k, ffi::Buffer<ffi::F32> top_p, ffi::Buffer<ffi::F32> min_p,
                ffi::Buffer<ffi::U32> seed, ffi::Buffer<ffi::U32> position,
                ffi::Result<ffi::Buffer<ffi::S32>> tokens) {
  const int64_t vocab_size = logits.dimensions()[1];
  std::vector<Row> rows;
  for (int64_t i = 0; i < logits.dimensions()[0]; i++) {
    rows.push_back({logits.typed_data() + i * vocab_size, vocab_size, temperature.typed_data()[i],
                    top_k.typed_data()[i], top_p.typed_data()[i], min_p.typed_data()[i], seed.typed_data()[i],
                    position.typed_data()[i]});
  }
  draw_all(pool, rows, tokens->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_paged_attention, paged_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_matmul, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_draw, draw,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
