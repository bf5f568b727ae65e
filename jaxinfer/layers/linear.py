"""Matrix multiplication with weights stored `[out, in]`, as checkpoints store them."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.param import Axes, param
from pallas_kernels.matmul import contract


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
