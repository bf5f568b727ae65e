"""A function of rows in groups, in plain JAX: the reference, and the default on CPU.

The rows of each group are cut into tiles, and a loop goes over the tiles in use: so the parameters of a group without
rows are not read, no product is padded by more than a tile for each group, and what is between the function's first
product and its last takes a tile's room. `jax.lax.ragged_dot` multiplies every row by every weight on CPU and GPU. A
loop whose length depends on data goes back to the host each time on a GPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.product import Product
from pallas_kernels.matmul import contract
from pallas_kernels.ragged import max_num_tiles, token_places

_MIN_TILE_ROWS, _MAX_TILE_ROWS = 4, 64  # where a CPU reads a weight as fast as it can, and where it computes


def unsupported(smallest_size: int, device: jax.Device | None = None) -> str | None:
    """It can run anything."""
    del smallest_size, device
    return None


def workspace_numbers(*, num_rows: int, num_expected: int, num_groups: int, embed_dim: int, mlp_dim: int) -> int:
    """Most numbers of `grouped_map` of a gated MLP, and of its rows as they are sorted before and behind: an estimate.

    Rows are there 4 times: as they are read, padded, computed, in order again. A tile has its products, and a copy of
    its group's weights unless the group is the only one.
    """
    copied = embed_dim if num_groups > 1 else 0
    of_tile = 3 * (copied + tile_rows(num_expected, num_groups)) * mlp_dim  # 3: gate, up and down, or their product
    return 4 * num_rows * embed_dim + of_tile


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows that are mapped at once: about those of a group, were all alike."""
    return min(num_rows, _MAX_TILE_ROWS, max(_MIN_TILE_ROWS, num_rows // num_groups))


def grouped_map(
    function: Callable[[Product, Any, jax.Array], jax.Array],
    params: Any,
    x: jax.Array,
    group_sizes: jax.Array,
    num_expected: int | None = None,
) -> jax.Array:
    """function(product, params of its group, row) of each row of x [R, I], sorted by group -> [R, O].

    `params` is a tree of arrays [G, ...], group_sizes int32 [G]. The function takes some rows at once, [rows, I] ->
    [rows, O], each by itself, and parameters with the groups' dimension or without; so it has them multiplied by
    `product`. Rows beyond the last group's are whatever: neither zero nor right. There are about `num_expected` before
    them; None: all are.
    """
    num_rows, num_groups = x.shape[0], group_sizes.shape[0]
    tile = tile_rows(num_expected or num_rows, num_groups)
    num_tiles = -(-group_sizes // tile)
    tiles = token_places(num_tiles, max_num_tiles(num_rows, num_groups, tile))
    first_rows = jnp.cumsum(group_sizes) - group_sizes
    padded = jnp.pad(x, ((0, tile), (0, 0)))

    def tile_of(i: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        group = tiles.sequence[i]
        row = first_rows[group] + tiles.offset[i] * tile
        of_group = jax.tree.map(lambda p: lax.dynamic_index_in_dim(p, group, keepdims=False), params)
        return row, function(_product, of_group, lax.dynamic_slice_in_dim(padded, row, tile))

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        # What a tile writes beyond its group's end the next one, which comes later, writes again.
        row, new = tile_of(i)
        return lax.dynamic_update_slice_in_dim(out, new, row, axis=0)

    new = jax.eval_shape(lambda: tile_of(0)[1])
    out = jnp.zeros((num_rows + tile, *new.shape[1:]), new.dtype)
    return lax.fori_loop(0, jnp.sum(num_tiles), step, out)[:num_rows]


def _product(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Of one group."""
    out = contract(x, weight.reshape(-1, weight.shape[-1])).reshape(-1, *weight.shape[:-1])
    return out if bias is None else out + bias
