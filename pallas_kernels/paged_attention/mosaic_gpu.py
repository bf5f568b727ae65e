"""Paged attention for Hopper GPUs, H100 and H200: Pallas, through its Mosaic GPU lowering.

Computes what `xla.py` documents, in two launches, like `triton.py`: items of `work_list.py`, of which each goes over
the cached tokens that a tile of queries sees, or over some of them, and then the merging of those. What Hopper adds:
of a block of threads one warpgroup does nothing but start copies, each of a (page, head) tile or of a piece of it, into
a ring in shared memory, and the others multiply straight from there (FlashAttention-3, arXiv:2407.08608).

In bfloat16 and float16 alone: the matrix unit does not multiply float32. With jax 0.10 it is started outside of CUDA
graphs, and so splits the one that a step otherwise is; with 0.12 it is inside.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import mosaic_gpu_kernel, mosaic_gpu_merge, work_list
from pallas_kernels.paged_attention.blocks import first_visible
from pallas_kernels.paged_attention.checks import check_ragged, check_rows
from pallas_kernels.paged_attention.mosaic_gpu_ring import WGMMA_ROWS, Inputs, Work, row_numbers
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiling import Tiling, Tuning
from pallas_kernels.ragged import max_num_tiles, token_positions

_BLOCK_TOKENS = WGMMA_ROWS
# Of both `extra_items` are those of all heads together: as many blocks of threads as run at once, two on each of 132
# multiprocessors. Of `num_stages` there are as many as `_tiling` finds shared memory for.
DECODE = Tuning(
    max_rows=WGMMA_ROWS, block_tokens=_BLOCK_TOKENS, extra_items=264, min_blocks=4, num_warps=8, num_stages=6
)
PREFILL = dataclasses.replace(DECODE, max_rows=2 * WGMMA_ROWS, min_blocks=16)
_SHARED_BYTES = (113 * 1024, 227 * 1024)  # that a block of threads has if two run at once on a multiprocessor, or one
_MIN_STAGES = 3
_OTHER_BYTES = 5 * 1024  # of shared memory: for barriers, positions, and what the compiler takes
_LARGEST_HEAD = 256

INTERPRET: Any = None  # for tests: `plgpu.InterpretGPUParams()` runs it, slowly, where there is no GPU


def unsupported(spec: AttentionSpec, device: jax.Device | None = None) -> str | None:
    """Why `spec` cannot run on `device`, or None if it can."""
    if spec.dtype == "float32":
        return "the matrix unit that it multiplies with does not take float32"
    if spec.value_dim is not None:
        return f"it reads values from pages of their own, and here they are the first {spec.value_dim} of the keys"
    if spec.cache_dtype is not None:
        return f"its copies go straight to the matrix unit, which does not multiply {spec.cache_dtype} by the queries"
    if spec.context_size > 1:
        return f"it computes no parts that devices merge, and sequences are spread over {spec.context_size} of them"
    if spec.head_dim % WGMMA_ROWS or spec.head_dim > _LARGEST_HEAD:
        return f"it is for a head_dim that is a multiple of {WGMMA_ROWS}, up to {_LARGEST_HEAD}, not {spec.head_dim}"
    if spec.page_size % 8 or (spec.page_size % _BLOCK_TOKENS and _BLOCK_TOKENS % spec.page_size):
        return f"it reads {_BLOCK_TOKENS} tokens at once, and a page_size of {spec.page_size} does not fit into that"
    if device is None or INTERPRET is not None:
        return None
    capability = str(getattr(device, "compute_capability", None))
    if not capability.startswith("9."):
        return f"it is for NVIDIA GPUs of compute capability 9, Hopper, and this is {device.device_kind}"
    return None


def unreachable_pages(spec: AttentionSpec) -> range:
    """None."""
    del spec
    return range(0)


def workspace_bytes(
    spec: AttentionSpec, *, rows: int, chunks: int, chunk_tokens: int, context_tokens: int, itemsize: int
) -> int:
    """Most bytes that a step's attention needs beside the cache: an estimate. As in `xla.py`."""
    del context_tokens  # work lists are small
    of_tiles = 0
    for num_sequences, num_tokens, max_tokens in ((rows, rows, 1), (chunks, chunk_tokens, chunk_tokens)):
        tiling = _tiling(spec, max_tokens, itemsize)
        num_tiles = max_num_tiles(num_tokens, num_sequences + 1, tiling.tokens)
        tile = tiling.num_programs * tiling.rows * spec.head_dim
        part = 4 * (tile + tiling.num_programs * 2 * row_numbers(tiling))
        num_parts = work_list.max_num_parts(tiling.tuning.extra_items)
        # 3: queries, and what comes out, of tiles that have no parts and of those that do
        of_tiles = max(of_tiles, 3 * num_tiles * tile * itemsize + num_parts * part)
    return 2 * (rows + chunk_tokens) * spec.num_q_heads * spec.head_dim * itemsize + of_tiles


def paged_attention(
    q: jax.Array,  # [B, T, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # the same
    block_tables: jax.Array,  # int32 [B, M]; entries in [0, P)
    positions: jax.Array,  # int32 [B, T]; in [-1, M * page_size)
    *,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # [N]
) -> jax.Array:
    """Attention of T new tokens of each of B sequences -> [B, T, N, H] in q's dtype. Softmax in float32."""
    check_rows(q, k_pages, v_pages, block_tables, positions, spec, sinks)
    b, t = positions.shape
    lengths = jnp.full(b, t, jnp.int32)
    flat = q.reshape(b * t, *q.shape[2:])
    return _attend(flat, k_pages, v_pages, block_tables, positions.ravel(), lengths, spec, sinks, t).reshape(q.shape)


def ragged_paged_attention(
    q: jax.Array,  # [S, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # the same
    block_tables: jax.Array,  # int32 [C, M]
    starts: jax.Array,  # int32 [C]
    lengths: jax.Array,  # int32 [C]
    *,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # [N]
) -> jax.Array:
    """The same for C sequences of `lengths` new tokens from positions `starts` on, one after the other in q."""
    check_ragged(q, k_pages, v_pages, block_tables, starts, lengths, spec, sinks)
    positions = token_positions(starts, lengths, len(q))
    return _attend(q, k_pages, v_pages, block_tables, positions, lengths, spec, sinks, len(q))


def _attend(
    q: jax.Array,  # [S, N, H]
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    positions: jax.Array,  # int32 [S]
    lengths: jax.Array,  # int32 [C]
    spec: AttentionSpec,
    sinks: jax.Array | None,
    max_tokens: int,
) -> jax.Array:
    """Of sequences of at most `max_tokens` tokens -> [S, N, H]."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"q is {q.dtype}; expected bfloat16 or float16, or another --attention_backend")
    tiling = _tiling(spec, max_tokens, q.dtype.itemsize)
    tuning = tiling.tuning
    first = jnp.zeros_like(positions) if spec.window is None else jnp.maximum(positions - (spec.window - 1), 0)
    tiles, items = work_list.make(
        lengths,
        jnp.minimum(first, positions + 1) // tuning.block_tokens,
        -(-(positions + 1) // tuning.block_tokens),
        tile_tokens=tiling.tokens,
        extra_items=tuning.extra_items,
        min_blocks=tuning.min_blocks,
    )
    rows = _rows(tiles, positions, tiling)
    of_program = jnp.arange(tiling.num_programs)[:, None]
    grouped = q.reshape(len(q), tiling.num_programs, tiling.heads, spec.head_dim)
    row_sinks = None
    if sinks is not None:
        row = jnp.arange(rows.token.shape[1], dtype=jnp.int32) % tiling.heads
        row_sinks = sinks.astype(jnp.float32).reshape(tiling.num_programs, tiling.heads)[:, row]
    token, head = (x[:, None, : tiling.rows] for x in (rows.token, rows.head))
    flat = (-1, spec.page_size, spec.head_dim)
    inputs = Inputs(
        _work(tiles, items, rows, tiling),
        grouped[token, of_program, head].reshape(-1, spec.head_dim),
        rows.position,
        row_sinks,
        k_pages.reshape(flat),
        v_pages.reshape(flat),
        block_tables,
    )

    num_parts = work_list.max_num_parts(tuning.extra_items)
    out, parts = mosaic_gpu_kernel.attend(inputs, num_parts, tiling, INTERPRET)
    outs = (out, mosaic_gpu_merge.merge(tiles, parts, q.dtype, tiling, INTERPRET))
    return _of_tokens(outs, tiles, len(q), tiling)


def _tiling(spec: AttentionSpec, max_tokens: int, itemsize: int) -> Tiling:
    """With as many stages as fit, and so few that two blocks of threads run at once, if those are enough."""
    tiling = Tiling(spec, DECODE if max_tokens == 1 else PREFILL, max_tokens)
    stage = 2 * _BLOCK_TOKENS * spec.head_dim * itemsize
    others = tiling.rows * (spec.head_dim + _BLOCK_TOKENS) * itemsize + _OTHER_BYTES
    stages = [(shared - others) // stage for shared in _SHARED_BYTES]
    num_stages = min(tiling.tuning.num_stages, next((n for n in stages if n >= _MIN_STAGES), stages[-1]))
    extra_items = max(1, tiling.tuning.extra_items // tiling.num_programs)
    tuning = dataclasses.replace(tiling.tuning, num_stages=num_stages, extra_items=extra_items)
    return dataclasses.replace(tiling, tuning=tuning)


class _Rows(NamedTuple):
    """int32 [tiles, R], R of them at least `WGMMA_ROWS`."""

    token: jax.Array
    head: jax.Array  # of those of the tile
    position: jax.Array


def _rows(tiles: work_list.Tiles, positions: jax.Array, tiling: Tiling) -> _Rows:
    row = jnp.arange(row_numbers(tiling), dtype=jnp.int32)
    row = jnp.minimum(row, tiles.num_tokens[:, None] * tiling.heads - 1)
    token = jnp.clip(tiles.first_token[:, None] + row // tiling.heads, 0, len(positions) - 1)
    return _Rows(token, row % tiling.heads, positions[token])


def _work(tiles: work_list.Tiles, items: work_list.Items, rows: _Rows, tiling: Tiling) -> Work:
    window, block_tokens = tiling.spec.window, tiling.tuning.block_tokens
    newest = jnp.max(rows.position, axis=1)[items.tile]
    end_whole = (jnp.min(rows.position, axis=1) + 1)[items.tile] // block_tokens
    oldest, first_whole = jnp.zeros_like(newest), items.first_block
    if window is not None:
        oldest = jnp.min(first_visible(rows.position, window), axis=1)[items.tile]
        first_whole = -(-jnp.maximum(newest - (window - 1), 0) // block_tokens)
    first_whole = jnp.clip(first_whole, items.first_block, items.end_block)
    return Work(
        num_tokens=items.num_tokens,
        tile=items.tile,
        sequence=items.sequence,
        first_block=items.first_block,
        first_whole=first_whole,
        end_whole=jnp.clip(end_whole, first_whole, items.end_block),
        end_block=items.end_block,
        oldest=oldest,
        newest=newest,
        part=items.part,
        is_first=(items.part <= tiles.first_part[items.tile]).astype(jnp.int32),
    )


def _of_tokens(outs: tuple[jax.Array, jax.Array], tiles: work_list.Tiles, num_tokens: int, tiling: Tiling) -> jax.Array:
    """Rows of tiles, of those without parts and of those with -> [S, N, H]."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    before = (tiles.first_token <= token[:, None]) & (tiles.num_tokens > 0)
    tile = (jnp.sum(before, axis=1, dtype=jnp.int32) - 1)[:, None, None]
    row = (token[:, None, None] - tiles.first_token[tile]) * tiling.heads + jnp.arange(tiling.heads)
    shape = (-1, tiling.num_programs, tiling.rows, tiling.spec.head_dim)
    whole, merged = (out.reshape(shape)[tile, jnp.arange(tiling.num_programs)[:, None], row] for out in outs)
    out = jnp.where((tiles.num_parts[tile] > 0)[..., None], merged, whole)
    return out.reshape(num_tokens, tiling.spec.num_q_heads, tiling.spec.head_dim)
