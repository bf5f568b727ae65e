"""How warpgroups attend when a tile has many queries: each has 64 of them, and both multiply them by the same blocks.

Queries are the rows of all products, and weights go from one product to the next in registers (FlashAttention-3,
arXiv:2407.08608): while a warpgroup computes weights, the other one has the matrix unit.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_gpu_ring import (
    WGMMA_ROWS,
    Parts,
    Shared,
    Work,
    capped,
    clear,
    meet,
    over_blocks,
    write,
)
from pallas_kernels.paged_attention.tiling import Tiling

_MATRIX = plgpu.Layout.WGMMA
_OF_ROW = plgpu.Layout.WGMMA.reduce(1)


class _State(NamedTuple):
    """`PartialSoftmax` of `WGMMA_ROWS` rows, with `largest` of scores times log2(e)."""

    largest: jax.Array  # float32 [R]
    total: jax.Array  # float32 [R]
    out: tuple[jax.Array, ...]  # float32 [R, size], pieces of [R, H]


class Consumer(NamedTuple):
    """One of the warpgroups that multiply."""

    number: jax.Array  # from 0 on
    is_interpreted: bool

    @property
    def rows(self) -> Any:
        return pl.ds(self.number * WGMMA_ROWS, WGMMA_ROWS)


def _pieces(head_dim: int) -> list[Any]:
    """As large as registers allow beside all that is summed up."""
    size = 128 if head_dim <= 128 else 64
    return [pl.ds(first, min(size, head_dim - first)) for first in range(0, head_dim, size)]


def attend(
    work: Work,
    shared: Shared,
    out: Any,
    parts: Parts,
    program: jax.Array,
    tiling: Tiling,
    consumer: Consumer,
    *,
    has_sinks: bool,
) -> None:
    """Of an item that is all of its tile to `out`, of another to `parts`."""
    state = _softmax(work, shared, consumer, tiling, has_sinks)
    pieces = _pieces(tiling.spec.head_dim)

    @pl.when(work.part < 0)
    def _() -> None:
        factor = 1 / jnp.maximum(state.total, jnp.finfo(jnp.float32).tiny)
        for piece, x in zip(pieces, state.out, strict=True):
            shared.q[consumer.rows, piece] = (x * _to_columns(factor, x)).astype(out.dtype)
        first_row = (work.tile * tiling.num_programs + program) * tiling.rows + consumer.number * WGMMA_ROWS
        write((shared.q.at[consumer.rows], out.at[pl.ds(first_row, WGMMA_ROWS)]))

    @pl.when(work.part >= 0)
    def _() -> None:
        place = work.part * tiling.num_programs + program
        for i, x in enumerate((state.largest, state.total)):
            shared.sums[i, consumer.rows] = x
        meet(shared, tiling)  # what comes out goes where the others may still read blocks
        for piece, x in zip(pieces, state.out, strict=True):
            shared.out[consumer.rows, piece] = x
        of_place = parts.out.at[pl.ds(place * tiling.rows + consumer.number * WGMMA_ROWS, WGMMA_ROWS)]
        sums = [(shared.sums.at[i, consumer.rows], parts.sums.at[place, i, consumer.rows]) for i in range(2)]
        write(*sums, (shared.out.at[consumer.rows], of_place))


def _softmax(work: Work, shared: Shared, consumer: Consumer, tiling: Tiling, has_sinks: bool) -> _State:
    plgpu.barrier_wait(shared.rows_ready)
    position = plgpu.layout_cast(shared.positions[consumer.rows], _OF_ROW)
    largest = plgpu.layout_cast(jnp.full(WGMMA_ROWS, -jnp.inf, jnp.float32), _OF_ROW)
    total = plgpu.layout_cast(jnp.zeros(WGMMA_ROWS, jnp.float32), _OF_ROW)
    if has_sinks:  # each a score that was seen before all others
        sinks = plgpu.layout_cast(shared.sinks[consumer.rows], _OF_ROW)
        largest = sinks * math.log2(math.e) + jnp.where(work.is_first > 0, 0.0, -jnp.inf)
        total = jnp.where(largest > -jnp.inf, 1.0, total)
    out = [
        plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, piece.size), jnp.float32), _MATRIX)
        for piece in _pieces(tiling.spec.head_dim)
    ]

    def add(block: jax.Array, state: _State, is_masked: bool) -> _State:
        return _add_block(block, state, work, shared, consumer, tiling, position if is_masked else None)

    return over_blocks(add, _State(largest, total, tuple(out)), work, tiling.spec)


def _add_block(
    block: jax.Array,
    state: _State,
    work: Work,
    shared: Shared,
    consumer: Consumer,
    tiling: Tiling,
    position: jax.Array | None,
) -> _State:
    """With `position` int32 [R], masks what rows do not see."""
    spec, tuning = tiling.spec, tiling.tuning
    slot = lax.rem(block - work.first_block, jnp.int32(tuning.num_stages))
    first = block * tuning.block_tokens
    plgpu.barrier_wait(shared.keys_ready.at[slot])
    queries = shared.q.at[consumer.rows]
    score = capped(_multiply(queries, shared.keys.at[slot].transpose((1, 0)), tuning.block_tokens), spec)
    if position is not None:
        cached = first + plgpu.broadcasted_iota(jnp.int32, score.shape, 1, layout=_MATRIX)
        of_row = _to_columns(position, score)
        visible = cached <= of_row
        if spec.window is not None:
            visible &= cached > of_row - spec.window
        score = jnp.where(visible, score, -jnp.inf)
    largest = jnp.maximum(state.largest, jnp.max(score, axis=1))
    finite = largest if position is None else jnp.where(largest > -jnp.inf, largest, 0.0)  # of one that sees nothing
    weight = jnp.exp2(score - _to_columns(finite, score))
    kept = jnp.exp2(state.largest - finite)
    total = state.total * kept + jnp.sum(weight, axis=1)
    weight = weight.astype(shared.q.dtype)
    plgpu.barrier_wait(shared.values_ready.at[slot])
    values = shared.values.at[slot]
    if position is not None:
        clear(values, work.oldest - first, work.newest - first, consumer.number, shared, tiling)
    out = []
    for piece, x in zip(_pieces(spec.head_dim), state.out, strict=True):
        of_piece = values.at[:, piece]
        if consumer.is_interpreted:  # there an array is not multiplied by a reference
            new = jnp.dot(weight, of_piece[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
        else:
            new = _multiply(weight, of_piece, piece.size)
        out.append(x * _to_columns(kept, x) + new)

    @pl.when(block + tuning.num_stages < work.end_block)
    def _() -> None:
        plgpu.barrier_arrive(shared.free.at[slot])

    return _State(largest, total, tuple(out))


def _multiply(a: Any, b: Any, num_columns: int) -> jax.Array:
    def multiply(product: Any) -> jax.Array:
        plgpu.wgmma(product, a, b)
        return product[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, num_columns), jnp.float32))


def _to_columns(of_row: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(of_row, like.shape, [0])
