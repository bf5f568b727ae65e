"""Matrix multiplication with weights stored `[out, in]`, as checkpoints store them."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxinfer.layers.param import Axes, param
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


class Linear(nnx.Module):
    """y = x W^T + b over named axes.

    The weight has shape outputs + inputs, for example [heads, head_dim, embed]; grouping several axes
    on one side keeps a head whole when the matrix is split.
    """

    def __init__(self, inputs: Axes, outputs: Axes, *, use_bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.num_inputs = len(inputs)
        self.weight = param(outputs + inputs, dtype, rngs)
        self.bias = param(outputs, dtype, rngs, "zeros") if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., *inputs] -> [..., *outputs], same dtype."""
        weight = self.weight[...]
        num_outputs = weight.ndim - self.num_inputs
        lead, out_shape, in_shape = x.shape[: -self.num_inputs], weight.shape[:num_outputs], weight.shape[num_outputs:]
        matrix = weight.reshape(math.prod(out_shape), math.prod(in_shape))
        y = contract(x.reshape(*lead, math.prod(in_shape)), matrix).reshape(*lead, *out_shape)
        return y if self.bias is None else y + self.bias[...]
