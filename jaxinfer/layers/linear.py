"""Matrix multiplication with weights stored `[out, in]`, as checkpoints store them."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxinfer.layers.param import Axes, param

# Up to this many rows the product is written weight @ x.T: on XLA:CPU that reads a float32 weight at
# two to three times the speed of x @ weight.T, and on GPU the two are the same call.
_MAX_ROWS_WEIGHT_STATIONARY = 16


def matmul_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Full precision for float32, so that a GPU does not round its operands to TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def contract(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., I] times weight [O, I] -> [..., O], summed in float32, returned in `out_dtype` (default x's)."""
    out_dtype = out_dtype or x.dtype
    rows = x.reshape(-1, x.shape[-1])
    lhs, rhs = (weight, rows) if rows.shape[0] <= _MAX_ROWS_WEIGHT_STATIONARY else (rows, weight)
    product = lax.dot_general(
        lhs,
        rhs,
        (((1,), (1,)), ((), ())),
        precision=matmul_precision(x.dtype),
        preferred_element_type=out_dtype,
    )
    if lhs is weight:
        product = product.T
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
