"""Draws of next tokens by the C++ of `native/draw.h`: for CPUs."""

import jax
import jax.numpy as jnp

from pallas_kernels.draw.row_params import RowParams
from pallas_kernels.native import build


def draw(logits: jax.Array, params: RowParams) -> jax.Array:
    """Token ids int32 [B] from float32 logits [B, V]. Rows are spread over the threads that XLA has."""
    if problem := build.unavailable():
        raise RuntimeError(f"draws in a kernel: {problem}")
    return jax.ffi.ffi_call("jaxinfer_draw", jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32))(logits, *params)
