"""What a block of threads of `mosaic_gpu.py` has to do, and how it gets what it needs into shared memory."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiling import Tiling

T = TypeVar("T")

WGMMA_ROWS = 64  # of the first of two matrices that are multiplied
FEW_ROWS = 32  # queries of a tile, up to which cached tokens are the rows
_SWIZZLE_BYTES, _SWIZZLE_ROWS = 128, 8  # of the layout that products want: numbers of a row, rows
_CLEARED = 64  # numbers of each token at once, in registers


class Work(NamedTuple):
    """int32 [I]: of `work_list.Items`, and what its tile's queries see. Blocks that all see whole need no mask."""

    num_tokens: jax.Array
    tile: jax.Array
    sequence: jax.Array
    first_block: jax.Array
    first_whole: jax.Array
    end_whole: jax.Array
    end_block: jax.Array
    oldest: jax.Array  # cached token that a query sees
    newest: jax.Array
    part: jax.Array
    is_first: jax.Array  # of its tile's parts, or the only one


class Inputs(NamedTuple):
    """Rows are those of `Tiling.row`, and R of them at least `WGMMA_ROWS`."""

    work: Work
    q: jax.Array  # [tiles * programs * rows, H]
    positions: jax.Array  # int32 [tiles, R]
    sinks: jax.Array | None  # float32 [programs, R]
    k_pages: jax.Array  # [P * K, page_size, H]
    v_pages: jax.Array  # the same
    block_tables: jax.Array  # int32 [C, M]


class Parts(NamedTuple):
    """Of items that are not all of their tile; `largest` of scores times log2(e)."""

    sums: jax.Array  # float32 [parts * programs, 2, R]: `largest` and `total` of `PartialSoftmax`
    out: jax.Array  # float32 [parts * programs * rows, H]


class Shared(NamedTuple):
    """Shared memory: a ring of blocks, which one warpgroup fills, and which is empty when the others have read them."""

    ring: Any  # keys and values, or what comes out, float32 [rows, H]
    q: Any  # [rows, H]
    positions: Any  # int32 [R]
    sinks: Any  # float32 [R]
    sums: Any  # float32 [2, R]
    rows_ready: Any  # barriers
    keys_ready: Any  # [stages]
    values_ready: Any
    free: Any
    consumers_met: Any
    weights: Any = None  # [rows, block]; where rows are few

    @property
    def keys(self) -> Any:
        """[stages, block, H]"""
        return self.ring[0][0]

    @property
    def values(self) -> Any:
        """[stages, block, H]"""
        return self.ring[0][1]

    @property
    def out(self) -> Any:
        """float32 [rows, H]"""
        return self.ring[1]


def row_numbers(tiling: Tiling) -> int:
    """R."""
    return max(WGMMA_ROWS, tiling.rows)


def num_consumers(tiling: Tiling) -> int:
    """Warpgroups that multiply."""
    return max(1, tiling.rows // WGMMA_ROWS)


def shared_types(tiling: Tiling, dtype: Any, *, has_sinks: bool) -> tuple[Any, ...]:
    """What to allocate, of `Shared`. Each copy arrives at its barrier, and each consumer."""
    tuning, head_dim = tiling.tuning, tiling.spec.head_dim
    stages, consumers, num_rows = tuning.num_stages, num_consumers(tiling), row_numbers(tiling)
    block = _matrix((stages, tuning.block_tokens, head_dim), dtype)
    ready = plgpu.Barrier(num_arrivals=tuning.block_tokens // _copied_tokens(tiling), num_barriers=stages)
    shared = Shared(
        ring=plgpu.RefUnion((block, block), _matrix((tiling.rows, head_dim), jnp.float32)),
        q=_matrix((tiling.rows, head_dim), dtype),
        positions=plgpu.SMEM((num_rows,), jnp.int32),
        sinks=plgpu.SMEM((num_rows,), jnp.float32),
        sums=plgpu.SMEM((2, num_rows), jnp.float32),
        rows_ready=plgpu.Barrier(num_arrivals=3 if has_sinks else 2),
        keys_ready=ready,
        values_ready=ready,
        free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        consumers_met=plgpu.Barrier(num_arrivals=consumers),
        weights=_matrix((tiling.rows, tuning.block_tokens), dtype),
    )
    return shared if tiling.rows <= FEW_ROWS else shared[:-1]


def _matrix(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory, laid out as products of matrices want it."""
    tile = (_SWIZZLE_ROWS, _SWIZZLE_BYTES // jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform(tile), plgpu.SwizzleTransform(_SWIZZLE_BYTES)))


def _copied_tokens(tiling: Tiling) -> int:
    return min(tiling.spec.page_size, tiling.tuning.block_tokens)


def load(inputs: Inputs, work: Work, shared: Shared, program: jax.Array, tiling: Tiling) -> None:
    """A tile's rows and then block for block, as soon as there is room."""
    spec, tuning, size = tiling.spec, tiling.tuning, _copied_tokens(tiling)
    row = (work.tile * tiling.num_programs + program) * tiling.rows
    of_rows: list[tuple[Any, Any]] = [
        (inputs.q.at[pl.ds(row, tiling.rows)], shared.q),
        (inputs.positions.at[work.tile], shared.positions),
    ]
    if inputs.sinks is not None:
        of_rows.append((inputs.sinks.at[program], shared.sinks))
    for source, target in of_rows:
        plgpu.copy_gmem_to_smem(source, target, shared.rows_ready)
    # Behind the last token there may be no page; to read its own again costs little.
    last_column = lax.div(work.newest, jnp.int32(spec.page_size))

    def load_block(block: jax.Array, _: None) -> None:
        slot = lax.rem(block - work.first_block, jnp.int32(tuning.num_stages))

        @pl.when(block >= work.first_block + tuning.num_stages)
        def _() -> None:
            plgpu.barrier_wait(shared.free.at[slot])

        sources = []
        for first in range(0, tuning.block_tokens, size):
            token = block * tuning.block_tokens + first
            column = jnp.minimum(lax.div(token, jnp.int32(spec.page_size)), last_column)
            page = inputs.block_tables[work.sequence, column]
            offset = lax.rem(token, jnp.int32(spec.page_size)) if size < spec.page_size else 0
            sources.append((page * spec.num_kv_heads + tiling.kv_head(program), pl.ds(offset, size)))
        copies: list[tuple[Any, Any, Any]] = [
            (inputs.k_pages, shared.keys, shared.keys_ready),
            (inputs.v_pages, shared.values, shared.values_ready),
        ]
        for pages, ring, ready in copies:
            for i, source in enumerate(sources):
                plgpu.copy_gmem_to_smem(pages.at[source], ring.at[slot, pl.ds(i * size, size)], ready.at[slot])

    lax.fori_loop(work.first_block, work.end_block, load_block, None)


def over_blocks(add: Callable[[jax.Array, T, bool], T], state: T, work: Work, spec: AttentionSpec) -> T:
    """`add(block, state, is_masked)` for each block of an item: one after the other, a mask only where it is needed."""

    def add_masked(block: jax.Array, state: T) -> T:
        return add(block, state, True)

    if spec.window is not None:
        state = lax.fori_loop(work.first_block, work.first_whole, add_masked, state)
    state = lax.fori_loop(work.first_whole, work.end_whole, lambda block, state: add(block, state, False), state)
    return lax.fori_loop(work.end_whole, work.end_block, add_masked, state)


def clear(values: Any, oldest: jax.Array, newest: jax.Array, consumer: jax.Array | int, shared: Shared, tiling: Tiling):
    """Of tokens [block, H] all but those, so that what is stale is not multiplied: 0 * NaN is NaN."""
    head_dim, consumers = tiling.spec.head_dim, num_consumers(tiling)

    def clear_piece(first: int) -> None:
        piece = values.at[:, pl.ds(first, _CLEARED)]
        loaded = plgpu.layout_cast(piece[...], plgpu.Layout.WGMMA)
        token = plgpu.broadcasted_iota(jnp.int32, loaded.shape, 0, layout=plgpu.Layout.WGMMA)
        piece[...] = jnp.where((token >= oldest) & (token <= newest), loaded, jnp.zeros_like(loaded))

    for i, first in enumerate(range(0, head_dim, _CLEARED)):  # each consumer some
        pl.when(consumer == i % consumers)(functools.partial(clear_piece, first))
    plgpu.commit_smem()
    meet(shared, tiling)


def meet(shared: Shared, tiling: Tiling) -> None:
    """Consumers wait for each other."""
    if num_consumers(tiling) > 1:
        plgpu.barrier_arrive(shared.consumers_met)
        plgpu.barrier_wait(shared.consumers_met)


def write(*copies: tuple[Any, Any]) -> None:
    """From shared memory to that of the GPU."""
    plgpu.commit_smem()
    for source, target in copies:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)


def capped(product: jax.Array, spec: AttentionSpec) -> jax.Array:
    """The score times log2(e)."""
    if spec.soft_cap is None:
        return product * (spec.scale * math.log2(math.e))
    grown = jnp.exp2(product * (2 * math.log2(math.e) * spec.scale / spec.soft_cap))
    return (1 - 2 / (grown + 1)) * (spec.soft_cap * math.log2(math.e))  # a tanh that is more exact than the GPU's own
