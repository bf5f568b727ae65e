"""Draws of next tokens by a kernel: what `jaxinfer.sampling` documents, without XLA's many passes over the logits."""

from collections.abc import Callable

import jax

from pallas_kernels.draw import cpu, triton
from pallas_kernels.draw.row_params import RowParams
from pallas_kernels.native import build
from pallas_kernels.triton_launch import unsupported_device

__all__ = ["Kernel", "RowParams", "kernel_for"]

Kernel = Callable[[jax.Array, RowParams], jax.Array]  # of float32 logits [B, V], which it has whole -> int32 [B]


def kernel_for(device: jax.Device) -> Kernel | None:
    """The kernel that draws on such a device; None if it is left to XLA."""
    if device.platform == "cpu":
        return cpu.draw if build.unavailable() is None else None
    is_for_triton = device.platform == "gpu" and unsupported_device(device) is None
    return triton.draw if is_for_triton else None
