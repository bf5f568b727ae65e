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

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention import blocks, ragged
from pallas_kernels.paged_attention.checks import check_rows
from pallas_kernels.paged_attention.pages import Pages
from pallas_kernels.paged_attention.partial import PartialSoftmax
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.ragged import max_num_tiles

T = TypeVar("T")

_CPU_BLOCK_TOKENS = 64
_CPU_GROUP_ROWS = 2
_TILE_TOKENS, _CPU_TILE_TOKENS = 128, 32  # of ragged sequences, attended over as a row


def block_tokens(context_tokens: int, spec: AttentionSpec) -> int:
    """Tokens of each sequence that are gathered at once; whole pages. At most a device's share of a sequence."""
    most = -(-context_tokens // (spec.page_size * spec.context_size)) * spec.page_size
    if not spec.is_on_cpu:
        return most
    return min(most, max(1, _CPU_BLOCK_TOKENS // spec.page_size) * spec.page_size)


def group_rows(num_rows: int, spec: AttentionSpec) -> int:
    """Sequences that are attended over at once."""
    return min(num_rows, _CPU_GROUP_ROWS) if spec.is_on_cpu else num_rows


def tile_tokens(spec: AttentionSpec) -> int:
    """New tokens of a ragged sequence that are attended over as a row."""
    return _CPU_TILE_TOKENS if spec.is_on_cpu else _TILE_TOKENS


def unreachable_pages(spec: AttentionSpec) -> range:
    """None."""
    del spec
    return range(0)


def workspace_bytes(
    spec: AttentionSpec, *, rows: int, chunks: int, chunk_tokens: int, context_tokens: int, itemsize: int
) -> int:
    """Most bytes that a step's attention needs beside the cache: an estimate.

    For `rows` sequences of one new token and `chunks` ragged ones of `chunk_tokens` together, over block tables of
    `context_tokens`.
    """
    block = block_tokens(context_tokens, spec)
    tile = min(tile_tokens(spec), chunk_tokens)
    tiles = max_num_tiles(chunk_tokens, chunks, tile)
    rows_at_once, tiles_at_once = group_rows(rows, spec), group_rows(tiles, spec)
    gathered = block * spec.token_bytes(itemsize)  # of one sequence
    if spec.cache_dtype is not None:
        gathered += block * spec.token_numbers * itemsize  # as they are multiplied
    scores = 2 * 4 * block * spec.num_q_heads  # of one token; 2: before and after softmax; 4: float32
    query_tokens = rows + -(-tiles // tiles_at_once) * tiles_at_once * tile
    kept = 4 if spec.context_size > 1 else itemsize  # what is merged is float32
    queries = query_tokens * spec.num_q_heads * spec.head_dim * (2 * kept + 4)  # with outputs, before in float32
    return queries + rows_at_once * (gathered + scores) + tiles_at_once * (gathered + tile * scores)


def unsupported(spec: AttentionSpec, device: jax.Device | None = None) -> str | None:
    """Nothing is: every spec runs on every platform."""
    del spec, device
    return None


def paged_attention(
    q: jax.Array,  # [B, T, N, H]
    k_pages: Pages,  # [P, K, page_size, H]
    v_pages: Pages | None,  # the same; None where spec.value_dim is not
    block_tables: jax.Array,  # int32 [B, M]; entries in [0, P)
    positions: jax.Array,  # int32 [B, T]; in [-1, M * page_size)
    *,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # [N]
) -> jax.Array:
    """Attention of T new tokens of each of B sequences -> [B, T, N, spec.out_dim] in q's dtype. Softmax in float32."""
    check_rows(q, k_pages, v_pages, block_tables, positions, spec, sinks)
    block_pages = _block_pages(spec, block_tables)

    def attend(q: jax.Array, block_tables: jax.Array, positions: jax.Array) -> jax.Array:
        sequences = (block_tables, None, positions)
        part = blocks.attend(q, k_pages, v_pages, *sequences, spec=spec, block_pages=block_pages, sinks=sinks)
        out = part.out / jnp.maximum(part.total, jnp.finfo(jnp.float32).tiny)[..., None]
        return out.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(*q.shape[:-1], spec.out_dim)

    length = lambda q, block_tables, positions: jnp.max(positions, axis=1)  # noqa: E731
    return _by_length(spec, attend, length, q, block_tables, positions)


def partial_paged_attention(
    q: jax.Array,  # [B, T, N, H]
    k_pages: Pages,  # [P, K, page_size, H]
    v_pages: Pages | None,  # the same; None where spec.value_dim is not
    block_tables: jax.Array,  # int32 [B, M]; entries in [0, P)
    columns: jax.Array,  # int32 [B, M]; ascending, in [0, M]
    positions: jax.Array,  # int32 [B, T]; in [-1, M * page_size)
    *,
    spec: AttentionSpec,
) -> PartialSoftmax:
    """The same over some of the sequences' pages only, for `partial.merge` -> of [B, T, N].

    Page block_tables[b, i] holds the tokens at columns[b, i] * page_size and behind. A row's pages come first, in order
    of position; entries without one have column M, where no token is. Work is for the pages that there are, in blocks
    of as many as are a device's share of M.
    """
    check_rows(q, k_pages, v_pages, block_tables, positions, spec, None, columns)
    block_pages = _block_pages(spec, block_tables)

    def attend(q: jax.Array, *sequences: jax.Array) -> PartialSoftmax:
        part = blocks.attend(q, k_pages, v_pages, *sequences, spec=spec, block_pages=block_pages)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 3, 1).reshape(*q.shape[:-1], *x.shape[4:]), part)

    def num_seen(q: jax.Array, block_tables: jax.Array, columns: jax.Array, positions: jax.Array) -> jax.Array:
        return blocks.num_seen(columns, positions, spec.page_size)

    return _by_length(spec, attend, num_seen, q, block_tables, columns, positions)


def ragged_paged_attention(
    q: jax.Array,  # [S, N, H]
    k_pages: Pages,  # [P, K, page_size, H]
    v_pages: Pages | None,  # the same; None where spec.value_dim is not
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

    return ragged.attend_by_tiles(q, block_tables, starts, lengths, tile_tokens(spec), attend)


def ragged_partial_paged_attention(
    q: jax.Array,  # [S, N, H]
    k_pages: Pages,  # [P, K, page_size, H]
    v_pages: Pages | None,  # the same; None where spec.value_dim is not
    block_tables: jax.Array,  # int32 [C, M]
    columns: jax.Array,  # int32 [C, M]
    starts: jax.Array,  # int32 [C]
    lengths: jax.Array,  # int32 [C]
    *,
    spec: AttentionSpec,
) -> PartialSoftmax:
    """The same for C sequences of `lengths` new tokens from positions `starts` on -> of [S, N]."""

    def attend(q: jax.Array, pages: tuple[jax.Array, jax.Array], positions: jax.Array) -> PartialSoftmax:
        return partial_paged_attention(q, k_pages, v_pages, *pages, positions, spec=spec)

    return ragged.attend_by_tiles(q, (block_tables, columns), starts, lengths, tile_tokens(spec), attend)


def _block_pages(spec: AttentionSpec, block_tables: jax.Array) -> int:
    context_tokens = block_tables.shape[1] * spec.page_size
    return block_tokens(context_tokens, spec) // spec.page_size


def _by_length(
    spec: AttentionSpec, attend: Callable[..., T], length: Callable[..., jax.Array], *arrays: jax.Array
) -> T:
    """`attend(*arrays)`, whose arrays and results have a row for each sequence, for few of like `length` at a time."""
    b = arrays[0].shape[0]
    rows = group_rows(b, spec)
    if rows == b:
        return attend(*arrays)
    by_length = jnp.argsort(length(*arrays))
    order = jnp.pad(by_length, (-b % rows, 0), mode="edge")  # to whole groups, with the shortest again
    arrays = tuple(x[order] for x in arrays)

    def attend_group(i: jax.Array, outs: T) -> T:
        new = attend(*(lax.dynamic_slice_in_dim(x, i * rows, rows) for x in arrays))
        return jax.tree.map(lambda out, x: lax.dynamic_update_slice_in_dim(out, x, i * rows, axis=0), outs, new)

    shapes = jax.eval_shape(attend, *arrays)
    # All of it is overwritten. Constants would be made for all layers at the start of a step, and be there together.
    filling = arrays[0].ravel()[0]
    outs = jax.tree.map(lambda x: jnp.full(x.shape, filling, x.dtype), shapes)
    outs = lax.fori_loop(0, len(order) // rows, attend_group, outs)
    back = -b % rows + jnp.argsort(by_length)
    return jax.tree.map(lambda out: out[back], outs)
