"""How exactly matrices are multiplied, for every operation and every layer of a model."""

import jax.numpy as jnp
from jax import lax


def matmul_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Full precision for float32, so that a GPU does not round its operands to TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
