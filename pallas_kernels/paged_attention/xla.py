"""Paged attention in plain JAX: the reference for every backend, and the default on CPU.

For sequence b, query t at position p = positions[b, t], and query head n reading KV head k = n // group_size:

    key[j]   = k_pages[block_tables[b, j // page_size], k, j % page_size]      (value[j] likewise)
    score[j] = cap(scale * <q[b, t, n], key[j]>)     for p - window < j <= p, else -inf
    out      = sum_j softmax(score)[j] * value[j]

with cap and window as `AttentionSpec` has them; so a query sees the cached tokens up to and including its own, which
must have been written before; at position -1 it sees none, and the result is zero. Pages beyond a sequence's last
token may hold anything, NaN included: what is masked is never multiplied. With sinks (gpt-oss, arXiv:2508.10925) the
softmax has one score more, sinks[n], whose value is zero.

It goes over the context in blocks with a running softmax (Milakov and Gimelshein, arXiv:1805.02867; the scheme of
FlashAttention), and over the sequences in groups of like length, each up to its longest sequence's last block: so
`block_tables` may be wider than any sequence is long, and a long sequence does not hold up the short ones. On a CPU
blocks and groups are small enough to stay in its caches: for many sequences several times as fast as one pass over
everything gathered. Elsewhere it is the whole context of all, for there a short operation costs its launch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention import ragged
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.precision import matmul_precision
from pallas_kernels.ragged import max_num_tiles

_CPU_BLOCK_TOKENS = 64
_CPU_GROUP_ROWS = 2
_TILE_TOKENS, _CPU_TILE_TOKENS = 128, 32  # of ragged sequences, attended over as a row


def block_tokens(context_tokens: int, page_size: int) -> int:
    """Tokens of each sequence that are gathered at once; whole pages."""
    if jax.default_backend() != "cpu":
        return context_tokens
    return min(context_tokens, max(1, _CPU_BLOCK_TOKENS // page_size) * page_size)


def group_rows(num_rows: int) -> int:
    """Sequences that are attended over at once."""
    return num_rows if jax.default_backend() != "cpu" else min(num_rows, _CPU_GROUP_ROWS)


def tile_tokens() -> int:
    """New tokens of a ragged sequence that are attended over as a row."""
    return _TILE_TOKENS if jax.default_backend() != "cpu" else _CPU_TILE_TOKENS


def workspace_bytes(
    spec: AttentionSpec, *, rows: int, chunks: int, chunk_tokens: int, context_tokens: int, itemsize: int
) -> int:
    """Most bytes that a step's attention needs beside the cache: an estimate.

    For `rows` sequences of one new token and `chunks` ragged ones of `chunk_tokens` together, over block tables of
    `context_tokens`.
    """
    block, tile = block_tokens(context_tokens, spec.page_size), min(tile_tokens(), chunk_tokens)
    tiles = max_num_tiles(chunk_tokens, chunks, tile)
    rows_at_once, tiles_at_once = group_rows(rows), group_rows(tiles)
    gathered = block * spec.token_numbers * itemsize  # of one sequence
    scores = 2 * 4 * block * spec.num_q_heads  # of one token; 2: before and after softmax; 4: float32
    query_tokens = rows + -(-tiles // tiles_at_once) * tiles_at_once * tile
    queries = 4 * query_tokens * spec.num_q_heads * spec.head_dim * itemsize  # 4: with outputs, each in two orders
    return queries + rows_at_once * (gathered + scores) + tiles_at_once * (gathered + tile * scores)


def unsupported(spec: AttentionSpec) -> str | None:
    """Nothing is: every spec runs on every platform."""
    del spec
    return None


def paged_attention(
    q: jax.Array,  # [B, T, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array | None,  # the same; None where spec.value_dim is not
    block_tables: jax.Array,  # int32 [B, M]; entries in [0, P)
    positions: jax.Array,  # int32 [B, T]; in [-1, M * page_size)
    *,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # [N]
) -> jax.Array:
    """Attention of T new tokens of each of B sequences -> [B, T, N, spec.out_dim] in q's dtype. Softmax in float32."""
    _check(q, k_pages, v_pages, block_tables, positions, spec, sinks)
    b, rows = q.shape[0], group_rows(q.shape[0])
    if rows == b:
        return _attend_group(q, k_pages, v_pages, block_tables, positions, spec, sinks)
    by_length = jnp.argsort(jnp.max(positions, axis=1))
    order = jnp.pad(by_length, (-b % rows, 0), mode="edge")  # to whole groups, with the shortest again
    q, block_tables, positions = q[order], block_tables[order], positions[order]

    def attend(i: jax.Array, out: jax.Array) -> jax.Array:
        of_group = (lax.dynamic_slice_in_dim(x, i * rows, rows) for x in (q, block_tables, positions))
        group_q, group_tables, group_positions = of_group
        new = _attend_group(group_q, k_pages, v_pages, group_tables, group_positions, spec, sinks)
        return lax.dynamic_update_slice_in_dim(out, new, i * rows, axis=0)

    out = lax.fori_loop(0, len(order) // rows, attend, jnp.zeros((*q.shape[:-1], spec.out_dim), q.dtype))
    return out[-b % rows + jnp.argsort(by_length)]


def ragged_paged_attention(
    q: jax.Array,  # [S, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array | None,  # the same; None where spec.value_dim is not
    block_tables: jax.Array,  # int32 [C, M]
    starts: jax.Array,  # int32 [C]
    lengths: jax.Array,  # int32 [C]
    *,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # [N]
) -> jax.Array:
    """The same for C sequences of `lengths` new tokens from positions `starts` on, one after the other in q."""

    def attend(q: jax.Array, block_tables: jax.Array, positions: jax.Array) -> jax.Array:
        return paged_attention(q, k_pages, v_pages, block_tables, positions, spec=spec, sinks=sinks)

    return ragged.attend_by_tiles(q, block_tables, starts, lengths, tile_tokens(), attend)


def _attend_group(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    block_tables: jax.Array,
    positions: jax.Array,
    spec: AttentionSpec,
    sinks: jax.Array | None,
) -> jax.Array:
    """Of all rows at once, block by block up to the last that one of them sees."""
    (b, t), num_columns = positions.shape, block_tables.shape[1]
    block_pages = block_tokens(num_columns * spec.page_size, spec.page_size) // spec.page_size
    num_blocks = -(-num_columns // block_pages)
    block_tables = jnp.pad(block_tables, ((0, 0), (0, num_blocks * block_pages - num_columns)))  # with the scratch page
    scaled = (q.astype(jnp.float32) * spec.scale).astype(q.dtype)
    grouped = scaled.reshape(b, t, spec.num_kv_heads, spec.group_size, spec.head_dim)

    def attend(i: jax.Array | int, state: _Softmax) -> _Softmax:
        pages = lax.dynamic_slice_in_dim(block_tables, i * block_pages, block_pages, axis=1)
        keys = _gather(k_pages, pages)
        values = keys[..., : spec.out_dim] if v_pages is None else _gather(v_pages, pages)
        cached = i * block_pages * spec.page_size + jnp.arange(keys.shape[2], dtype=jnp.int32)
        return _attend_block(state, grouped, keys, values, cached, positions, spec)

    rows = (b, spec.num_kv_heads, spec.group_size, t)
    state = _Softmax(
        largest=jnp.full(rows, -jnp.inf, jnp.float32),
        total=jnp.zeros(rows, jnp.float32),
        out=jnp.zeros((*rows, spec.out_dim), jnp.float32),
    )
    if sinks is not None:  # each a score that was seen before all others
        of_heads = sinks.astype(jnp.float32).reshape(spec.num_kv_heads, spec.group_size, 1)
        state = state._replace(largest=jnp.broadcast_to(of_heads, rows), total=jnp.ones(rows, jnp.float32))
    if num_blocks == 1:
        state = attend(0, state)
    else:
        block = block_pages * spec.page_size
        first = 0 if spec.window is None else jnp.min(_first_visible(positions, spec.window)) // block
        state = lax.fori_loop(first, jnp.max(positions) // block + 1, attend, state)
    out = state.out / jnp.maximum(state.total, jnp.finfo(jnp.float32).tiny)[..., None]
    return out.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(*q.shape[:-1], spec.out_dim)


class _Softmax(NamedTuple):
    """Of each query, over the tokens so far. [B, K, G, T], and [B, K, G, T, H] of `out`; float32."""

    largest: jax.Array  # score
    total: jax.Array  # of exp(score - largest)
    out: jax.Array  # the same times the values


def _first_visible(positions: jax.Array, window: int) -> jax.Array:
    """The first position that each query sees; one that sees nothing does not count for a minimum."""
    return jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, jnp.maximum(positions - (window - 1), 0))


def _attend_block(
    state: _Softmax,
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cached: jax.Array,
    positions: jax.Array,
    spec: AttentionSpec,
) -> _Softmax:
    """`q` is [B, T, K, G, H] and scaled, `keys` and `values` [B, K, S, H], at the positions `cached` [S]."""
    precision = matmul_precision(q.dtype)
    visible = cached <= positions[..., None]  # [B, T, S]
    if spec.window is not None:
        visible &= cached > positions[..., None] - spec.window
    readable = jnp.any(visible, axis=1)  # [B, S]; the rest may be stale, so 0 * NaN must not happen
    values = jnp.where(readable[:, None, :, None], values, jnp.zeros((), values.dtype))
    scores = jnp.einsum("btkgh,bksh->bkgts", q, keys, precision=precision, preferred_element_type=jnp.float32)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(visible[:, None, None], scores, jnp.float32(-jnp.inf))
    largest = jnp.maximum(state.largest, jnp.max(scores, axis=-1))
    finite = jnp.where(largest > -jnp.inf, largest, 0)  # of a query that sees nothing
    weights = jnp.exp(scores - finite[..., None])
    kept = jnp.exp(state.largest - finite)
    # XLA:CPU multiplies bfloat16 into float32 only where the result keeps the order of the operands.
    new = jnp.einsum(
        "bkgts,bksh->bkgth",
        weights.astype(values.dtype),
        values,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return _Softmax(largest, state.total * kept + jnp.sum(weights, axis=-1), state.out * kept[..., None] + new)


def _gather(pages: jax.Array, block_tables: jax.Array) -> jax.Array:
    """[P, K, page_size, H], int32 [B, M] -> [B, K, M * page_size, H].

    Gathers (page, head) tiles straight into the order that the matrix products want.
    """
    num_pages, num_kv_heads, page_size, head_dim = pages.shape
    b, m = block_tables.shape
    heads = jnp.arange(num_kv_heads, dtype=jnp.int32)
    tiles = block_tables[:, None, :] * num_kv_heads + heads[:, None]  # [B, K, M]
    gathered = pages.reshape(num_pages * num_kv_heads, page_size, head_dim)[tiles]
    return gathered.reshape(b, num_kv_heads, m * page_size, head_dim)


def _check(q, k_pages, v_pages, block_tables, positions, spec: AttentionSpec, sinks) -> None:
    b, t = positions.shape
    if q.shape != (b, t, spec.num_q_heads, spec.head_dim):
        raise ValueError(f"q has shape {q.shape}; expected {(b, t, spec.num_q_heads, spec.head_dim)} for {spec}")
    if sinks is not None and sinks.shape != (spec.num_q_heads,):
        raise ValueError(f"sinks has shape {sinks.shape}; expected {(spec.num_q_heads,)} for {spec}")
    page_shape = (spec.num_kv_heads, spec.page_size, spec.head_dim)
    if (v_pages is None) != (spec.value_dim is not None):
        raise ValueError(f"v_pages is {'None' if v_pages is None else 'given'}; expected the other for {spec}")
    for name, pages in (("k_pages", k_pages), ("v_pages", k_pages if v_pages is None else v_pages)):
        if pages.shape[1:] != page_shape or pages.shape != k_pages.shape:
            raise ValueError(f"{name} has shape {pages.shape}; expected (num_pages, *{page_shape}) for {spec}")
        if pages.dtype != q.dtype:
            raise ValueError(f"{name} is {pages.dtype}, q is {q.dtype}; they must be the same")
    if block_tables.ndim != 2 or block_tables.shape[0] != b:
        raise ValueError(f"block_tables has shape {block_tables.shape}; expected ({b}, pages per sequence)")
    for name, ids in (("block_tables", block_tables), ("positions", positions)):
        if ids.dtype != jnp.int32:
            raise ValueError(f"{name} is {ids.dtype}; expected int32")
