"""Grouped products for NVIDIA GPUs since Ampere: Pallas, through its Triton lowering. On a CPU it is interpreted.

Computes what `xla.py` documents: the function once, of all rows, its products each one launch. A program multiplies a
tile of rows of one group by a tile of its weight's columns, as in MegaBlocks (Gale et al., arXiv:2211.15841), so that
groups without rows cost nothing. No maintained kernel serves: JAX's own (`pallas.ops.gpu.ragged_dot_mgpu`) is for
Hopper alone, an example by its own account, and cannot be interpreted; tokamax' needs a newer Python and JAX than
ours, and profilers and quantizers with them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.grouped_matmul.product import Product
from pallas_kernels.grouped_matmul.triton_kernel import Tuning, grouped_matmul, make_tiles
from pallas_kernels.ragged import token_places
from pallas_kernels.triton_launch import MIN_DOT, SHARED_BYTES, unsupported_device

# For any GPU, from groups of a few rows, where reading weights takes the time, to large ones.
TUNINGS = (
    Tuning(rows=16, columns=64, depth=128, num_warps=4, num_stages=4),
    Tuning(rows=32, columns=64, depth=128, num_warps=4, num_stages=4),
    Tuning(rows=64, columns=128, depth=64, num_warps=4, num_stages=4),
    Tuning(rows=128, columns=128, depth=64, num_warps=8, num_stages=3),
)


def unsupported(smallest_size: int, device: jax.Device | None = None) -> str | None:
    """Why it cannot run on `device`, or None if it can."""
    if smallest_size < MIN_DOT:
        return f"it multiplies by {MIN_DOT} numbers at once, and a weight has a dimension of {smallest_size}"
    return unsupported_device(device)


def workspace_numbers(*, num_rows: int, num_expected: int, num_groups: int, embed_dim: int, mlp_dim: int) -> int:
    """Most numbers of `grouped_map` of a gated MLP, and of its rows as they are sorted before and behind: an estimate.

    Gate and up of all rows, and beside them first the rows, and then gate times up.
    """
    del num_expected, num_groups
    return num_rows * (2 * mlp_dim + max(embed_dim, mlp_dim))


def grouped_map(
    function: Callable[[Product, Any, jax.Array], jax.Array],
    params: Any,
    x: jax.Array,
    group_sizes: jax.Array,
    num_expected: int | None = None,
) -> jax.Array:
    """function(product, params of its group, row) of each row of x [R, I], sorted by group -> [R, O]."""
    num_rows, num_groups = x.shape[0], group_sizes.shape[0]
    tuning = _tuning(num_expected or num_rows, num_groups)
    tiles = make_tiles(group_sizes, num_rows, tuning.rows)
    group = token_places(group_sizes, num_rows).sequence

    def product(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        flat = weight.reshape(num_groups, -1, weight.shape[-1])
        out = grouped_matmul(x, flat, tiles, _that_fits(tuning, flat, x.dtype.itemsize))
        out = out.reshape(num_rows, *weight.shape[1:-1])
        return out if bias is None else out + bias[group]

    return function(product, params, x)


def _tuning(num_rows: int, num_groups: int) -> Tuning:
    """With tiles of twice the rows of a group, were all alike: most groups take one, and are read once."""
    return next((tuning for tuning in TUNINGS if tuning.rows * num_groups >= 2 * num_rows), TUNINGS[-1])


def _that_fits(tuning: Tuning, weight: jax.Array, itemsize: int) -> Tuning:
    """With tiles that are not larger than the weights [G, O, I], and fit into shared memory."""
    columns, depth = (
        min(most, 1 << (size.bit_length() - 1))
        for most, size in zip((tuning.columns, tuning.depth), weight.shape[1:], strict=True)
    )
    tuning = dataclasses.replace(tuning, columns=columns, depth=depth)
    while tuning.depth > MIN_DOT and tuning.num_stages * tuning.stage_numbers * itemsize > SHARED_BYTES:
        tuning = dataclasses.replace(tuning, depth=tuning.depth // 2)
    return tuning
