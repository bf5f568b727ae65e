"""Matrix multiplication with weights stored `[out, in]`, as checkpoints store them."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.param import Axes, param
from pallas_kernels.matmul import contract_each


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
        return apply_each([self], x)[0]


def apply_each(linears: Sequence[Linear], x: jax.Array) -> list[jax.Array]:
    """What each makes of x; they have the same inputs and dtype. A CPU's kernel multiplies with all weights at once."""
    weights, num_inputs = [linear.weight[...] for linear in linears], linears[0].num_inputs
    lead = x.shape[:-num_inputs]
    matrices = [weight.reshape(-1, math.prod(weight.shape[-num_inputs:])) for weight in weights]
    found = []
    for linear, weight, y in zip(linears, weights, contract_each(x.reshape(*lead, -1), matrices), strict=True):
        y = y.reshape(*lead, *weight.shape[:-num_inputs])
        found.append(y if linear.bias is None else y + linear.bias[...])
    return found
