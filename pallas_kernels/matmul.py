"""The product with a weight stored `[out, in]`, as checkpoints store them, written as each platform does it fastest."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.precision import matmul_precision

# On CPU, up to this many rows the product is written weight @ x.T: XLA reads a float32 weight two to three times as
# fast as in x @ weight.T at 2 to 16 rows, and half as fast again at 32.
_MAX_ROWS_WEIGHT_STATIONARY = 64


def contract(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., I] times weight [O, I] -> [..., O], summed in float32 and rounded once to `out_dtype` (default x's).

    Where a mesh splits I, each device rounds the sum of its part, and these are added in `out_dtype`.
    """
    rows = x.reshape(-1, x.shape[-1])
    dot = functools.partial(
        lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=matmul_precision(x.dtype),
        preferred_element_type=out_dtype or x.dtype,
    )

    def weight_stationary(rows: jax.Array, weight: jax.Array) -> jax.Array:
        # Without the barrier XLA folds the transpose into the product, which makes it x @ weight.T again.
        return lax.optimization_barrier(dot(weight, rows)).T

    if rows.shape[0] <= _MAX_ROWS_WEIGHT_STATIONARY:
        product = lax.platform_dependent(rows, weight, cpu=weight_stationary, default=dot)
    else:
        product = dot(rows, weight)
    return product.reshape(*x.shape[:-1], weight.shape[0])
