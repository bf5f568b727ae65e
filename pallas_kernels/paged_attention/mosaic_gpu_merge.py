"""The kernel of `mosaic_gpu.py` that merges the parts of the tiles that have some, and how it is launched."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_gpu_ring import Parts
from pallas_kernels.paged_attention.tiling import Tiling
from pallas_kernels.paged_attention.work_list import Tiles

_ROWS = 8  # of a program
_THREADS = 128  # of a warpgroup, each of which has a number of a vector
_AT_ONCE = 4  # parts whose loads do not wait for each other


def _kernel(tiles: Tiles, parts: Parts, out: Any, *, tiling: Tiling) -> None:
    """A row is a few vectors, or the other way round; a vector may have the end of a row and the start of the next."""
    tile, program = lax.axis_index("tile"), lax.axis_index("program")
    first_row = lax.axis_index("rows") * _ROWS
    head_dim = tiling.spec.head_dim
    first_part, num_parts = tiles.first_part[tile], tiles.num_parts[tile]
    vectors = range(0, _ROWS * head_dim, _THREADS)

    def spread(of_row: list[jax.Array], first: int) -> jax.Array:
        row, last = first // head_dim, (first + _THREADS - 1) // head_dim
        if row == last:
            return of_row[row]
        number = plgpu.broadcasted_iota(jnp.int32, (_THREADS,), 0, layout=plgpu.Layout.WG_STRIDED((_THREADS,), 1))
        return jnp.where(number < last * head_dim - first, of_row[row], of_row[last])

    def add(step: jax.Array, state: Any) -> Any:
        largest, total, outs = state
        index = [step * _AT_ONCE + i for i in range(_AT_ONCE)]
        places = [(first_part + jnp.minimum(i, num_parts - 1)) * tiling.num_programs + program for i in index]
        scores = [[parts.sums[place, 0, first_row + row] for row in range(_ROWS)] for place in places]
        totals = [[parts.sums[place, 1, first_row + row] for row in range(_ROWS)] for place in places]
        first = first_row * head_dim
        values = [[parts.out[place, pl.ds(first + i, _THREADS)] for i in vectors] for place in places]
        for i, score, part_total, part_out in zip(index, scores, totals, values, strict=True):
            score = [jnp.where(i < num_parts, x, -jnp.inf) for x in score]
            most = [jnp.maximum(x, y) for x, y in zip(largest, score, strict=True)]
            finite = [jnp.where(x > -jnp.inf, x, 0.0) for x in most]
            kept = [jnp.exp2(x - y) for x, y in zip(largest, finite, strict=True)]
            added = [jnp.exp2(x - y) for x, y in zip(score, finite, strict=True)]
            total = [t * k + u * a for t, k, u, a in zip(total, kept, part_total, added, strict=True)]
            outs = [x * spread(kept, v) + y * spread(added, v) for v, x, y in zip(vectors, outs, part_out, strict=True)]
            largest = most
        return largest, total, outs

    @pl.when(num_parts > 0)
    def _() -> None:
        zeros = jnp.zeros(_THREADS, jnp.float32)
        nothing = plgpu.layout_cast(zeros, plgpu.Layout.WG_STRIDED((_THREADS,), 1))
        scores, totals = [jnp.float32(-jnp.inf)] * _ROWS, [jnp.float32(0)] * _ROWS
        steps = lax.div(num_parts + _AT_ONCE - 1, jnp.int32(_AT_ONCE))
        _, total, outs = lax.fori_loop(0, steps, add, (scores, totals, [nothing for _ in vectors]))
        factor = [1 / jnp.maximum(x, jnp.finfo(jnp.float32).tiny) for x in total]
        place, first = tile * tiling.num_programs + program, first_row * head_dim
        for i, x in zip(vectors, outs, strict=True):
            out[place, pl.ds(first + i, _THREADS)] = (x * spread(factor, i)).astype(out.dtype)


def merge(tiles: Tiles, parts: Parts, dtype: jnp.dtype, tiling: Tiling, interpret: Any = None) -> jax.Array:
    """[parts * programs, rows, ...] -> [tiles * programs, rows * H]; tiles that have no parts are not written."""
    num_tiles, num_programs = tiles.num_parts.shape[0], tiling.num_programs
    numbers = tiling.rows * tiling.spec.head_dim
    return plgpu.kernel(
        functools.partial(_kernel, tiling=tiling),
        out_type=jax.ShapeDtypeStruct((num_tiles * num_programs, numbers), dtype),
        grid=(num_tiles, num_programs, tiling.rows // _ROWS),
        grid_names=("tile", "program", "rows"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="merge_kernel",
        interpret=interpret,
    )(tiles, parts._replace(out=parts.out.reshape(-1, numbers)))
