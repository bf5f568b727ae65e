"""Paged attention for NVIDIA GPUs since Ampere: Pallas, through its Triton lowering. On a CPU it is interpreted.

Computes what `xla.py` documents, in two launches. A program of the first goes over the blocks of cached tokens of an
item of `work_list.py`. The queries of its tile that read the same KV head, tokens times heads, are the rows of one
matrix, so that decoding uses the matrix unit too. What it knows of a tile that it shares with others goes to the second
launch in float32, where the parts are merged (Milakov and Gimelshein, arXiv:1805.02867).
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import triton_kernel, work_list
from pallas_kernels.paged_attention.checks import check_ragged, check_rows
from pallas_kernels.paged_attention.pages import Pages, values_and_scales
from pallas_kernels.paged_attention.partial import PartialSoftmax
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiling import MIN_DOT, Tiling, Tuning
from pallas_kernels.paged_attention.triton_kernel import Inputs
from pallas_kernels.ragged import token_places

KeysAndValues = tuple[Pages, Pages | None]
Tables = tuple[jax.Array, jax.Array | None]  # block_tables, columns

# For any GPU: `_that_fits` has blocks that fit the smallest shared memory there is, and rows that fit the registers.
DECODE = Tuning(max_rows=64, block_tokens=64, extra_items=128, min_blocks=4, num_warps=4, num_stages=3)
PREFILL = Tuning(max_rows=128, block_tokens=64, extra_items=32, min_blocks=16, num_warps=8, num_stages=2)
_SHARED_BYTES = 96 * 1024
_MAX_NUMBERS, _MAX_BYTES = 2**31, 2**32  # of an array with offsets of 32 bits
_THREAD_NUMBERS = 128  # of what comes out, of 255 registers
_OLDEST = {None: (8, 0), "int8": (8, 0), "float8_e4m3fn": (8, 9)}  # compute capability, by what pages hold


def unsupported(spec: AttentionSpec, device: jax.Device | None = None) -> str | None:
    """Why `spec` cannot run on `device`, or None if it can."""
    for name, size in (("head_dim", spec.head_dim), ("value_dim", spec.out_dim)):
        if size % MIN_DOT:
            return f"it multiplies by {MIN_DOT} numbers at once, and a {name} of {size} is no multiple of that"
    if device is None or device.platform == "cpu":
        return None
    capability = str(getattr(device, "compute_capability", None))
    if not re.fullmatch(r"\d+\.\d+", capability):
        return f"it is for NVIDIA GPUs, and this is {device.device_kind}"
    if tuple(map(int, capability.split("."))) < _OLDEST[spec.cache_dtype]:
        least = ".".join(map(str, _OLDEST[spec.cache_dtype]))
        kind = f" for a cache of {spec.cache_dtype}" if spec.cache_dtype else ""
        return f"it is for GPUs of compute capability {least} or more{kind}, and {device.device_kind} has {capability}"
    return None


def workspace_bytes(
    spec: AttentionSpec, *, rows: int, chunks: int, chunk_tokens: int, context_tokens: int, itemsize: int
) -> int:
    """Most bytes that a step's attention needs beside the cache: an estimate. As in `xla.py`."""
    del chunks, context_tokens  # work lists are small
    kept = 4 if spec.context_size > 1 else itemsize  # what is merged is float32
    outputs = (rows + chunk_tokens) * spec.num_q_heads * spec.out_dim * kept
    parts = 0
    for tuning, num_tokens in ((DECODE, 1), (PREFILL, chunk_tokens)):
        tiling = Tiling(spec, _that_fits(tuning, spec, itemsize), num_tokens)
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
) -> jax.Array:
    """Attention of T new tokens of each of B sequences -> [B, T, N, spec.out_dim] in q's dtype. Softmax in float32."""
    check_rows(q, k_pages, v_pages, block_tables, positions, spec, sinks)
    return _of_rows(q, (k_pages, v_pages), (block_tables, None), positions, spec, sinks)


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
) -> jax.Array:
    """The same for C sequences of `lengths` new tokens from positions `starts` on, one after the other in q."""
    check_ragged(q, k_pages, v_pages, block_tables, starts, lengths, spec, sinks)
    tables = (block_tables, None)
    return _attend(q, (k_pages, v_pages), tables, _positions(starts, lengths, len(q)), lengths, spec, sinks, len(q))


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
    tables = (block_tables, columns)
    return _attend(q, (k_pages, v_pages), tables, _positions(starts, lengths, len(q)), lengths, spec, None, len(q))


def _of_rows(
    q: jax.Array, pages: KeysAndValues, tables: Tables, positions: jax.Array, spec: AttentionSpec, sinks: Any
) -> Any:
    """`_attend` of sequences that all have T new tokens, q [B, T, N, H] -> [B, T, ...]."""
    b, t = positions.shape
    lengths = jnp.full(b, t, jnp.int32)
    out = _attend(q.reshape(b * t, *q.shape[2:]), pages, tables, positions.ravel(), lengths, spec, sinks, t)
    return jax.tree.map(lambda x: x.reshape(b, t, *x.shape[1:]), out)


def _attend(
    q: jax.Array,  # [S, N, H]
    pages: KeysAndValues,
    tables: Tables,
    positions: jax.Array,  # int32 [S]
    lengths: jax.Array,  # int32 [C]
    spec: AttentionSpec,
    sinks: jax.Array | None,
    max_tokens: int,
) -> Any:
    """Of sequences of at most `max_tokens` tokens -> [S, N, spec.out_dim], or with columns `PartialSoftmax`."""
    _check_offsets(pages[0])
    tuning = _that_fits(DECODE if max_tokens == 1 else PREFILL, spec, q.dtype.itemsize)
    tiling = Tiling(spec, tuning, max_tokens)
    first, end = _slots(positions, lengths, tables, spec)
    tiles, items = work_list.make(
        lengths,
        first // tuning.block_tokens,
        -(-end // tuning.block_tokens),
        tile_tokens=tiling.tokens,
        extra_items=tuning.extra_items,
        min_blocks=tuning.min_blocks,
    )
    inputs = Inputs(items, q, positions, *pages, *tables, sinks)
    return triton_kernel.attend(inputs, tiles, tiling, is_part=tables[1] is not None)


def _check_offsets(pages: Pages) -> None:
    """Pallas' Triton lowering has offsets of 64 bits for arrays of more than 4 GiB, else of 32, one a sign."""
    values, _ = values_and_scales(pages)
    if values.size > _MAX_NUMBERS and values.nbytes <= _MAX_BYTES:
        legal = [size // (values.size // len(values)) for size in (_MAX_NUMBERS, _MAX_BYTES)]
        raise ValueError(
            f"k_pages has {len(values)} pages of {values.dtype}, more than Triton's offsets of 32 bits reach and too "
            f"few for 64 bits; use at most {legal[0]} pages (a smaller --kv_cache_bytes), or more than {legal[1]}"
        )


def _that_fits(tuning: Tuning, spec: AttentionSpec, itemsize: int) -> Tuning:
    """With blocks that fit into shared memory and rows that fit into registers.

    Numbers of 8 bits are there as they are loaded, and once more as they are multiplied; and so are queries then.
    """
    rows, block_tokens = tuning.max_rows, tuning.block_tokens
    token_bytes = tuning.num_stages * spec.token_bytes(itemsize) // spec.num_kv_heads
    row_bytes = itemsize * spec.head_dim if spec.cache_dtype else 0
    while rows > MIN_DOT and (
        rows * spec.out_dim > tuning.num_warps * 32 * _THREAD_NUMBERS or rows * row_bytes > _SHARED_BYTES // 2
    ):
        rows //= 2
    while block_tokens > MIN_DOT and block_tokens * (token_bytes + row_bytes) > _SHARED_BYTES - rows * row_bytes:
        block_tokens //= 2
    return dataclasses.replace(tuning, max_rows=rows, block_tokens=block_tokens)


def _positions(starts: jax.Array, lengths: jax.Array, num_tokens: int) -> jax.Array:
    """Of ragged sequences' tokens, int32 [S]; -1 of padding."""
    place = token_places(lengths, num_tokens)
    return jnp.where(place.valid, starts[place.sequence] + place.offset, -1)


def _slots(
    positions: jax.Array, lengths: jax.Array, tables: Tables, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    """The first of the slots of a sequence's pages that each token sees, and the one behind the last. int32 [S]."""
    first = jnp.zeros_like(positions) if spec.window is None else jnp.maximum(positions - (spec.window - 1), 0)
    end = positions + 1
    if tables[1] is not None:  # the slots are of the pages that are here
        sequence = token_places(lengths, positions.shape[0]).sequence
        page = tables[1][sequence] * spec.page_size
        first = jnp.sum(page + spec.page_size <= first[:, None], axis=1, dtype=jnp.int32) * spec.page_size
        end = jnp.sum(page < end[:, None], axis=1, dtype=jnp.int32) * spec.page_size
    return jnp.minimum(first, end), end
