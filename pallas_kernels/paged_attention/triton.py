"""Paged attention for NVIDIA GPUs since Ampere: Pallas, through its Triton lowering. On a CPU it is interpreted.

Computes what `xla.py` documents, in two launches. A program of the first goes over the blocks of cached tokens of an
item of `work_list.py`. The queries of its tile that read the same KV head, tokens times heads, are the rows of one
matrix, so that decoding uses the matrix unit too. What it knows of a tile that it shares with others goes to the second
launch in float32, where the parts are merged (Milakov and Gimelshein, arXiv:1805.02867).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import triton_kernel, work_list
from pallas_kernels.paged_attention.checks import check_ragged, check_rows
from pallas_kernels.paged_attention.pages import Pages, values_and_scales
from pallas_kernels.paged_attention.partial import PartialSoftmax
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiling import Tiling, Tuning
from pallas_kernels.paged_attention.triton_kernel import Inputs
from pallas_kernels.paged_attention.triton_tuning import tuning_of
from pallas_kernels.ragged import token_places, token_positions
from pallas_kernels.triton_launch import FP8, MIN_DOT, unsupported_device

KeysAndValues = tuple[Pages, Pages | None]
Tables = tuple[jax.Array, jax.Array | None]  # block_tables, columns


class _New(NamedTuple):
    """The tokens that ask, S of C sequences, one sequence after the other."""

    positions: jax.Array  # int32 [S]; consecutive in a sequence, -1 of padding and of who asks nothing
    lengths: jax.Array  # int32 [C]
    max_tokens: int  # of a sequence


def unsupported(spec: AttentionSpec, device: jax.Device | None = None) -> str | None:
    """Why `spec` cannot run on `device`, or None if it can."""
    for name, size in (("head_dim", spec.head_dim), ("value_dim", spec.out_dim)):
        if size % MIN_DOT:
            return f"it multiplies by {MIN_DOT} numbers at once, and a {name} of {size} is no multiple of that"
    if spec.cache_dtype == "float8_e4m3fn":
        return unsupported_device(device, FP8, " for a cache of float8_e4m3fn")
    return unsupported_device(device)


def unreachable_pages(spec: AttentionSpec) -> range:
    """As many as these it cannot read: Pallas' Triton lowering has offsets of 32 bits up to 4 GiB, one a sign."""
    if spec.cache_dtype is None:
        return range(0)
    numbers = spec.num_kv_heads * spec.page_size * spec.head_dim  # of a byte, in one array's page
    return range(2**31 // numbers + 1, 2**32 // numbers + 1)


def workspace_bytes(
    spec: AttentionSpec, *, rows: int, chunks: int, chunk_tokens: int, context_tokens: int, itemsize: int
) -> int:
    """Most bytes that a step's attention needs beside the cache: an estimate. As in `xla.py`."""
    del chunks, context_tokens  # work lists are small
    kept = 4 if spec.context_size > 1 else itemsize  # what is merged is float32
    outputs = (rows + chunk_tokens) * spec.num_q_heads * spec.out_dim * kept
    parts = 0
    for kind, num_tokens in (("decode", 1), ("prefill", chunk_tokens)):
        tuning = tuning_of(spec, kind, itemsize)
        tiling = Tiling(spec, tuning, num_tokens)
        numbers = tiling.num_programs * tiling.rows * (spec.out_dim + 2)
        parts = max(parts, 4 * work_list.max_num_parts(tuning.extra_items) * numbers)
    return 2 * outputs + parts  # 2: of rows and prompts, and together


def paged_attention(
    q: jax.Array,  # [B, T, N, H]
    k_pages: Pages,  # [P, K, page_size, H]
    v_pages: Pages | None,  # the same; None where spec.value_dim is not
    block_tables: jax.Array,  # int32 [B, M]; entries in [0, P)
    positions: jax.Array,  # int32 [B, T]; in [-1, M * page_size)
    *,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # [N]
    tuning: Tuning | None = None,
) -> jax.Array:
    """Attention of T new tokens of each of B sequences -> [B, T, N, spec.out_dim] in q's dtype. Softmax in float32.

    `tuning` instead of what `tuning_of` says.
    """
    check_rows(q, k_pages, v_pages, block_tables, positions, spec, sinks)
    return _of_rows(q, (k_pages, v_pages), (block_tables, None), positions, spec, sinks, tuning)


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
    """The same over some of the sequences' pages only, as in `xla.py`, for `partial.merge` -> of [B, T, N]."""
    check_rows(q, k_pages, v_pages, block_tables, positions, spec, None, columns)
    return _of_rows(q, (k_pages, v_pages), (block_tables, columns), positions, spec, None)


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
    tuning: Tuning | None = None,
) -> jax.Array:
    """The same for C sequences of `lengths` new tokens from positions `starts` on, one after the other in q."""
    check_ragged(q, k_pages, v_pages, block_tables, starts, lengths, spec, sinks)
    new = _New(token_positions(starts, lengths, len(q)), lengths, len(q))
    return _attend(q, (k_pages, v_pages), (block_tables, None), new, spec, sinks, tuning)


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
    check_ragged(q, k_pages, v_pages, block_tables, starts, lengths, spec, columns=columns)
    new = _New(token_positions(starts, lengths, len(q)), lengths, len(q))
    return _attend(q, (k_pages, v_pages), (block_tables, columns), new, spec, None)


def _of_rows(
    q: jax.Array,
    pages: KeysAndValues,
    tables: Tables,
    positions: jax.Array,
    spec: AttentionSpec,
    sinks: jax.Array | None,
    tuning: Tuning | None = None,
) -> Any:
    """`_attend` of sequences that all have T new tokens, q [B, T, N, H] -> [B, T, ...]."""
    b, t = positions.shape
    new = _New(positions.ravel(), jnp.full(b, t, jnp.int32), t)
    out = _attend(q.reshape(b * t, *q.shape[2:]), pages, tables, new, spec, sinks, tuning)
    return jax.tree.map(lambda x: x.reshape(b, t, *x.shape[1:]), out)


def _attend(
    q: jax.Array,  # [S, N, H]
    pages: KeysAndValues,
    tables: Tables,
    new: _New,
    spec: AttentionSpec,
    sinks: jax.Array | None,
    tuning: Tuning | None = None,
) -> Any:
    """-> [S, N, spec.out_dim], or with columns `PartialSoftmax`."""
    values, _ = values_and_scales(pages[0])
    if len(values) in (unreachable := unreachable_pages(spec)):
        few, many = unreachable.start - 1, unreachable.stop
        raise ValueError(f"k_pages has {len(values)} pages; with {spec} there are {few} at most, or {many} at least")
    tuning = tuning or tuning_of(spec, "decode" if new.max_tokens == 1 else "prefill", q.dtype.itemsize)
    tiling = Tiling(spec, tuning, new.max_tokens)
    with jax.named_scope("work_list"):
        first, end = _slots(new, tables, spec)
        tiles, items = work_list.make(
            new.lengths,
            first // tuning.block_tokens,
            -(-end // tuning.block_tokens),
            tile_tokens=tiling.tokens,
            extra_items=tuning.extra_items,
            min_blocks=tuning.min_blocks,
        )
    inputs = Inputs(items, q, new.positions, *pages, *tables, sinks)
    return triton_kernel.attend(inputs, tiles, tiling, is_part=tables[1] is not None)


def _slots(new: _New, tables: Tables, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """The first of the slots of a sequence's pages that each token sees, and the one behind the last. int32 [S]."""
    positions = new.positions
    first = jnp.zeros_like(positions) if spec.window is None else jnp.maximum(positions - (spec.window - 1), 0)
    end = positions + 1
    if tables[1] is not None:  # the slots are of the pages that are here
        sequence = token_places(new.lengths, positions.shape[0]).sequence
        page = tables[1][sequence] * spec.page_size
        first = jnp.sum(page + spec.page_size <= first[:, None], axis=1, dtype=jnp.int32) * spec.page_size
        end = jnp.sum(page < end[:, None], axis=1, dtype=jnp.int32) * spec.page_size
    return jnp.minimum(first, end), end
