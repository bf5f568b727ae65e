"""The kernel of `triton.py`, and how it is launched."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.precision import matmul_precision
from pallas_kernels.ragged import max_num_tiles, token_places
from pallas_kernels.triton_launch import MIN_DOT, launch

_BAND_TILES = 8  # tiles that share what is read of a weight and of x, while it is near the cores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """What changes the speed alone. Raises ValueError for a size that is no power of two, or too small.

    Attributes:
      rows, columns: of a tile of what comes out.
      depth: inputs that are multiplied at once.
      num_warps: of a program, 32 threads each.
      num_stages: pieces of `depth` that a program has loaded or is loading.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def __post_init__(self):
        for name in ("rows", "columns", "depth"):
            size = getattr(self, name)
            if size < MIN_DOT or size.bit_count() != 1:
                raise ValueError(f"{name} {size}: must be a power of two, at least {MIN_DOT}")

    @property
    def stage_numbers(self) -> int:
        """That a stage has in shared memory."""
        return (self.rows + self.columns) * self.depth


class Tiles(NamedTuple):
    """int32 [T]; of rows of one group each."""

    group: jax.Array
    first_row: jax.Array
    num_rows: jax.Array  # 0: is not used


def make_tiles(group_sizes: jax.Array, num_rows: int, tile_rows: int) -> Tiles:
    """Made on the device. As many as there may be: a launch that is compiled once serves all sizes of groups."""
    num_tiles = max_num_tiles(num_rows, group_sizes.shape[0], tile_rows)
    band = min(num_tiles, _BAND_TILES)
    place = token_places(-(-group_sizes // tile_rows), -(-num_tiles // band) * band)
    offset = place.offset * tile_rows
    rows = jnp.minimum(group_sizes[place.sequence] - offset, tile_rows)
    first_row = (jnp.cumsum(group_sizes) - group_sizes)[place.sequence] + offset
    return Tiles(place.sequence, first_row, jnp.where(place.valid, rows, 0))


def _multiply_kernel(tiles: Tiles, x: Any, weight: Any, out: Any, *, tuning: Tuning, band: int) -> None:
    index = pl.program_id(2) * band + pl.program_id(0)
    tile = jax.tree.map(lambda ref: ref[index], tiles)
    (_, num_columns, size), depth = weight.shape, tuning.depth
    # The last pieces of a width or depth that does not divide begin earlier, and so overlap: all reads are in bounds.
    first = pl.program_id(1) * tuning.columns
    if num_columns % tuning.columns:
        first = jnp.minimum(first, num_columns - tuning.columns)
    columns = pl.ds(first, tuning.columns)
    dot = functools.partial(
        lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )

    @pl.when(tile.num_rows > 0)
    def _() -> None:
        # Beyond the tile's rows its last one again.
        rows = tile.first_row + jnp.minimum(jnp.arange(tuning.rows, dtype=jnp.int32), tile.num_rows - 1)

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            piece = pl.ds(i * depth, depth)
            return total + dot(x[rows, piece], weight[tile.group, columns, piece])

        total = lax.fori_loop(0, size // depth, add, jnp.zeros((tuning.rows, tuning.columns), jnp.float32))
        if left := size % depth:
            piece = pl.ds(size - depth, depth)
            is_left = jnp.arange(depth, dtype=jnp.int32) >= depth - left
            both = (x[rows, piece], weight[tile.group, columns, piece])
            total += dot(*(jnp.where(is_left, operand, jnp.zeros_like(operand)) for operand in both))
        out[rows, columns] = total.astype(out.dtype)


def grouped_matmul(x: jax.Array, weight: jax.Array, tiles: Tiles, tuning: Tuning) -> jax.Array:
    """x [R, I] times weight [G, O, I] -> [R, O], whatever in rows that no tile has. I and O are at least a tile's."""
    num_tiles, num_columns = tiles.group.shape[0], weight.shape[1]
    band = min(num_tiles, _BAND_TILES)
    out_shape = jax.ShapeDtypeStruct((x.shape[0], num_columns), x.dtype)
    whole = functools.partial(jax.tree.map, lambda a: pl.BlockSpec(a.shape, lambda *_: (0,) * len(a.shape)))
    return launch(
        functools.partial(_multiply_kernel, tuning=tuning, band=band),
        (tiles, x, weight),
        grid=(band, -(-num_columns // tuning.columns), num_tiles // band),
        in_specs=whole((tiles, x, weight)),
        out_shape=out_shape,
        out_specs=whole(out_shape),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
