"""Attention over a paged cache, block by block of pages with a running softmax: what `xla.py` is made of."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.pages import Pages, QuantizedPages, product_dtype, values_and_scales
from pallas_kernels.paged_attention.partial import PartialSoftmax
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.precision import matmul_precision


def attend(
    q: jax.Array,  # [B, T, N, H]
    k_pages: Pages,  # [P, K, page_size, H]
    v_pages: Pages | None,
    block_tables: jax.Array,  # int32 [B, M]
    columns: jax.Array | None,  # int32 [B, M]; None: 0, 1, ..., M - 1
    positions: jax.Array,  # int32 [B, T]
    *,
    spec: AttentionSpec,
    block_pages: int,
    sinks: jax.Array | None = None,  # [N]
) -> PartialSoftmax:
    """Of all rows at once, up to the last block that one of them sees -> [B, K, G, T], `out` [B, K, G, T, H]."""
    (b, t), num_columns = positions.shape, block_tables.shape[1]
    num_blocks = -(-num_columns // block_pages)
    padding = ((0, 0), (0, num_blocks * block_pages - num_columns))
    block_tables = jnp.pad(block_tables, padding)  # with the scratch page
    if columns is not None:
        columns = jnp.pad(columns, padding, constant_values=num_columns)
    scaled = (q.astype(jnp.float32) * spec.scale).astype(q.dtype)
    grouped = scaled.reshape(b, t, spec.num_kv_heads, spec.group_size, spec.head_dim)

    def attend_block(i: jax.Array | int, state: PartialSoftmax) -> PartialSoftmax:
        pages = lax.dynamic_slice_in_dim(block_tables, i * block_pages, block_pages, axis=1)
        keys = _gather(k_pages, pages)
        values = _first(keys, spec.out_dim) if v_pages is None else _gather(v_pages, pages)
        if columns is None:
            block_tokens = block_pages * spec.page_size
            cached = i * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)
        else:
            first = lax.dynamic_slice_in_dim(columns, i * block_pages, block_pages, axis=1) * spec.page_size
            cached = (first[..., None] + jnp.arange(spec.page_size, dtype=jnp.int32)).reshape(b, 1, -1)
        return _attend_block(state, grouped, keys, values, cached, positions, spec)

    rows = (b, spec.num_kv_heads, spec.group_size, t)
    state = PartialSoftmax(
        largest=jnp.full(rows, -jnp.inf, jnp.float32),
        total=jnp.zeros(rows, jnp.float32),
        out=jnp.zeros((*rows, spec.out_dim), jnp.float32),
    )
    if sinks is not None:  # each a score that was seen before all others
        of_heads = sinks.astype(jnp.float32).reshape(spec.num_kv_heads, spec.group_size, 1)
        state = state._replace(largest=jnp.broadcast_to(of_heads, rows), total=jnp.ones(rows, jnp.float32))
    if num_blocks == 1:
        return attend_block(0, state)
    if columns is None:
        block = block_pages * spec.page_size
        first = 0 if spec.window is None else jnp.min(first_visible(positions, spec.window)) // block
        end = jnp.max(positions) // block + 1
    else:
        first = _num_before(columns, positions, spec) // block_pages
        end = (jnp.max(num_seen(columns, positions, spec.page_size)) + block_pages - 1) // block_pages
    return lax.fori_loop(first, end, attend_block, state)


def num_seen(columns: jax.Array, positions: jax.Array, page_size: int) -> jax.Array:
    """How many of its pages, columns int32 [B, M], each row's last query has behind it or in it -> int32 [B]."""
    return jnp.sum(columns * page_size <= jnp.max(positions, axis=1, keepdims=True), axis=1, dtype=jnp.int32)


def _num_before(columns: jax.Array, positions: jax.Array, spec: AttentionSpec) -> jax.Array | int:
    """How many of its first pages no row sees any more."""
    if spec.window is None:
        return 0
    first = jnp.min(first_visible(positions, spec.window), axis=1, keepdims=True)
    return jnp.min(jnp.sum((columns + 1) * spec.page_size <= first, axis=1, dtype=jnp.int32))


def first_visible(positions: jax.Array, window: int) -> jax.Array:
    """The first position that each query sees; one that sees nothing does not count for a minimum."""
    return jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, jnp.maximum(positions - (window - 1), 0))


def _attend_block(
    state: PartialSoftmax,
    q: jax.Array,
    k: Pages,
    v: Pages,
    cached: jax.Array,
    positions: jax.Array,
    spec: AttentionSpec,
) -> PartialSoftmax:
    """`q` is [B, T, K, G, H] and scaled, `k` and `v` [B, K, S, H], at positions `cached` [S] or [B, 1, S]."""
    precision = matmul_precision(q.dtype)
    (keys, key_scales), (values, value_scales) = map(values_and_scales, (k, v))
    visible = cached <= positions[..., None]  # [B, T, S]
    if spec.window is not None:
        visible &= cached > positions[..., None] - spec.window
    readable = jnp.any(visible, axis=1)  # [B, S]; the rest may be stale, so 0 * NaN must not happen
    values = jnp.where(readable[:, None, :, None], values, jnp.zeros((), values.dtype))
    scores = jnp.einsum(
        "btkgh,bksh->bkgts", q, keys.astype(q.dtype), precision=precision, preferred_element_type=jnp.float32
    )
    if key_scales is not None:
        scores *= key_scales[:, :, None, None]
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(visible[:, None, None], scores, jnp.float32(-jnp.inf))
    largest = jnp.maximum(state.largest, jnp.max(scores, axis=-1))
    finite = jnp.where(largest > -jnp.inf, largest, 0)  # of a query that sees nothing
    weights = jnp.exp(scores - finite[..., None])
    kept = jnp.exp(state.largest - finite)
    scaled = weights
    if value_scales is not None:
        scaled = weights * jnp.where(readable[:, None], value_scales, 0)[:, :, None, None]
    dtype = product_dtype(q.dtype, spec.cache_dtype)
    # XLA:CPU multiplies bfloat16 into float32 only where the result keeps the order of the operands.
    new = jnp.einsum(
        "bkgts,bksh->bkgth",
        scaled.astype(dtype),
        values.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return PartialSoftmax(largest, state.total * kept + jnp.sum(weights, axis=-1), state.out * kept[..., None] + new)


def _gather(pages: Pages, block_tables: jax.Array) -> Pages:
    """[P, K, page_size, H], int32 [B, M] -> [B, K, M * page_size, H]; scales likewise.

    Gathers (page, head) tiles straight into the order that the matrix products want.
    """

    def gather(pages: jax.Array) -> jax.Array:
        num_pages, num_kv_heads, page_size, *numbers = pages.shape
        b, m = block_tables.shape
        heads = jnp.arange(num_kv_heads, dtype=jnp.int32)
        tiles = block_tables[:, None, :] * num_kv_heads + heads[:, None]  # [B, K, M]
        gathered = pages.reshape(num_pages * num_kv_heads, page_size, *numbers)[tiles]
        return gathered.reshape(b, num_kv_heads, m * page_size, *numbers)

    return jax.tree.map(gather, pages)


def _first(keys: Pages, value_dim: int) -> Pages:
    """Values that are part of the keys."""
    if isinstance(keys, QuantizedPages):
        return keys._replace(values=keys.values[..., :value_dim])
    return keys[..., :value_dim]
