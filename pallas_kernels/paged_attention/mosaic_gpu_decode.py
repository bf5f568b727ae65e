"""How a warpgroup attends when a tile has few queries: cached tokens are the rows of all products.

The matrix unit multiplies 64 rows at once, which few queries would fill with nothing. So scores are keys times queries,
and what comes out is values times weights, both transposed: as many columns as there are queries, and few registers.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_gpu_ring import Parts, Shared, Work, capped, clear, over_blocks, write
from pallas_kernels.paged_attention.tiling import Tiling

_MATRIX, _TRANSPOSED = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
_OF_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class _State(NamedTuple):
    """`PartialSoftmax` of rows R, with `largest` of scores times log2(e)."""

    largest: jax.Array  # float32 [R]
    totals: jax.Array  # float32 [block, R], to be added up over the first
    out: jax.Array  # float32 [H, R]


def attend(
    work: Work, shared: Shared, out: Any, parts: Parts, program: jax.Array, tiling: Tiling, *, has_sinks: bool
) -> None:
    """Of an item that is all of its tile to `out`, of another to `parts`."""
    largest, total, product = _softmax(work, shared, tiling, has_sinks)

    @pl.when(work.part < 0)
    def _() -> None:
        factor = 1 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        _store(shared.q, product * _to_rows(factor, product))
        first_row = (work.tile * tiling.num_programs + program) * tiling.rows
        write((shared.q, out.at[pl.ds(first_row, tiling.rows)]))

    @pl.when(work.part >= 0)
    def _() -> None:
        place = work.part * tiling.num_programs + program
        for i, x in enumerate((largest, total)):
            shared.sums[i, pl.ds(0, tiling.rows)] = x
        _store(shared.out, product)
        of_place = parts.out.at[pl.ds(place * tiling.rows, tiling.rows)]
        write((shared.sums, parts.sums.at[place]), (shared.out, of_place))


def _softmax(work: Work, shared: Shared, tiling: Tiling, has_sinks: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`PartialSoftmax` of rows R, [R], [R] and [H, R], with `largest` of scores times log2(e)."""
    rows = tiling.rows
    plgpu.barrier_wait(shared.rows_ready)
    position = plgpu.layout_cast(shared.positions[pl.ds(0, rows)], _OF_COLUMN)
    largest = plgpu.layout_cast(jnp.full(rows, -jnp.inf, jnp.float32), _OF_COLUMN)
    if has_sinks:  # each a score that was seen before all others
        sinks = plgpu.layout_cast(shared.sinks[pl.ds(0, rows)], _OF_COLUMN)
        largest = sinks * math.log2(math.e) + jnp.where(work.is_first > 0, 0.0, -jnp.inf)
    sink = largest

    def zeros(num_rows: int) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros((num_rows, rows), jnp.float32), _MATRIX)

    def add(block: jax.Array, state: _State, is_masked: bool) -> _State:
        return _add_block(block, state, work, shared, tiling, position if is_masked else None)

    nothing = _State(largest, zeros(tiling.tuning.block_tokens), zeros(tiling.spec.head_dim))
    state = over_blocks(add, nothing, work, tiling.spec)
    total = jnp.sum(state.totals, axis=0)
    if has_sinks:
        total += jnp.where(sink > -jnp.inf, jnp.exp2(sink - state.largest), 0.0)
    return state.largest, total, state.out


def _add_block(
    block: jax.Array, state: _State, work: Work, shared: Shared, tiling: Tiling, position: jax.Array | None
) -> _State:
    """With `position` int32 [R], masks what rows do not see."""
    spec, tuning = tiling.spec, tiling.tuning
    slot = lax.rem(block - work.first_block, jnp.int32(tuning.num_stages))
    first = block * tuning.block_tokens
    plgpu.barrier_wait(shared.keys_ready.at[slot])
    score = capped(_multiply(shared.keys.at[slot], shared.q.transpose((1, 0)), tiling.rows), spec)
    if position is not None:
        cached = first + plgpu.broadcasted_iota(jnp.int32, score.shape, 0, layout=_MATRIX)
        of_row = _to_rows(position, score)
        visible = cached <= of_row
        if spec.window is not None:
            visible &= cached > of_row - spec.window
        score = jnp.where(visible, score, -jnp.inf)
    largest = jnp.maximum(state.largest, jnp.max(score, axis=0))
    finite = largest if position is None else jnp.where(largest > -jnp.inf, largest, 0.0)  # of one that sees nothing
    weight = jnp.exp2(score - _to_rows(finite, score))
    kept = jnp.exp2(state.largest - finite)
    totals = state.totals * _to_rows(kept, weight) + weight
    _store(shared.weights, weight)
    plgpu.barrier_wait(shared.values_ready.at[slot])
    values = shared.values.at[slot]
    if position is not None:
        clear(values, work.oldest - first, work.newest - first, 0, shared, tiling)
    plgpu.commit_smem()
    new = _multiply(values.transpose((1, 0)), shared.weights.transpose((1, 0)), tiling.rows)

    @pl.when(block + tuning.num_stages < work.end_block)
    def _() -> None:
        plgpu.barrier_arrive(shared.free.at[slot])

    return _State(largest, totals, state.out * _to_rows(kept, state.out) + new)


def _multiply(a: Any, b: Any, num_columns: int) -> jax.Array:
    def multiply(product: Any) -> jax.Array:
        plgpu.wgmma(product, a, b)
        return product[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], num_columns), jnp.float32))


def _to_rows(of_column: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(of_column, like.shape, [1])


def _store(target: Any, matrix: jax.Array) -> None:
    """The transposed of one."""
    target.transpose((1, 0))[...] = plgpu.layout_cast(matrix.astype(target.dtype), _TRANSPOSED)
