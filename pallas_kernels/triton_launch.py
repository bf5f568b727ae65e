"""What kernels through Pallas' Triton lowering have in common: the GPUs they are for, and how they are launched."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

MIN_DOT = 16  # rows, columns and depth of the smallest product of matrices
SHARED_BYTES = 96 * 1024  # that a program may have on any of these GPUs
AMPERE, FP8 = (8, 0), (8, 9)  # compute capability since when there is such a GPU; and one that converts to and from it


def unsupported_device(device: jax.Device | None, oldest: tuple[int, int] = AMPERE, purpose: str = "") -> str | None:
    """Why a kernel cannot run there, or None if it can; on a CPU it is interpreted. Without a device, anywhere.

    It needs a GPU of compute capability `oldest` or more, `purpose` says for what.
    """
    if device is None or device.platform == "cpu":
        return None
    capability = str(getattr(device, "compute_capability", None))
    if not re.fullmatch(r"\d+\.\d+", capability):
        return f"it is for NVIDIA GPUs, and this is {device.device_kind}"
    if tuple(map(int, capability.split("."))) < oldest:
        least = ".".join(map(str, oldest))
        return (
            f"it is for GPUs of compute capability {least} or more{purpose}, and {device.device_kind} has {capability}"
        )
    return None


def launch(kernel: Callable[..., None], arguments: tuple[Any, ...], *, num_warps: int, num_stages: int, **kwargs: Any):
    """`pl.pallas_call` with `kwargs`. Interpreted on a CPU."""
    params = plt.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    compiled = pl.pallas_call(kernel, compiler_params=params, **kwargs)
    return lax.platform_dependent(*arguments, cpu=pl.pallas_call(kernel, interpret=True, **kwargs), default=compiled)
