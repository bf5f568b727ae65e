"""The kernel of `mosaic_gpu.py` that goes over cached tokens, and how it is launched."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import mosaic_gpu_decode, mosaic_gpu_prefill
from pallas_kernels.paged_attention.mosaic_gpu_ring import (
    FEW_ROWS,
    Inputs,
    Parts,
    Shared,
    load,
    num_consumers,
    row_numbers,
    shared_types,
)
from pallas_kernels.paged_attention.tiling import Tiling

_LOADING_REGISTERS, _MULTIPLYING_REGISTERS = 40, 232  # of a thread, where 65,536 are for one that loads and two others


def _kernel(inputs: Inputs, out: Any, parts: Parts, *shared: Any, tiling: Tiling, is_interpreted: bool) -> None:
    index, program = lax.axis_index("item"), lax.axis_index("program")
    work = jax.tree.map(lambda ref: ref[index], inputs.work)
    of_item = (work, Shared(*shared), out, parts, program, tiling)
    has_sinks, has_many = inputs.sinks is not None, num_consumers(tiling) > 1

    @pl.when(work.num_tokens > 0)
    def _() -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _() -> None:
            if has_many:
                plgpu.set_max_registers(_LOADING_REGISTERS, action="decrease")
            load(inputs, work, Shared(*shared), program, tiling)

        @pl.when(warpgroup > 0)
        def _() -> None:
            if has_many:
                plgpu.set_max_registers(_MULTIPLYING_REGISTERS, action="increase")
            if tiling.rows <= FEW_ROWS:
                mosaic_gpu_decode.attend(*of_item, has_sinks=has_sinks)
            else:
                consumer = mosaic_gpu_prefill.Consumer(warpgroup - 1, is_interpreted)
                mosaic_gpu_prefill.attend(*of_item, consumer, has_sinks=has_sinks)


def attend(inputs: Inputs, num_parts: int, tiling: Tiling, interpret: Any = None) -> tuple[jax.Array, Parts]:
    """-> [tiles * programs * rows, H] in q's dtype, whose tiles that have parts are not written; and the parts."""
    dtype, head_dim, num_programs = inputs.q.dtype, tiling.spec.head_dim, tiling.num_programs
    shape: Any = jax.ShapeDtypeStruct
    parts = Parts(
        sums=shape((num_parts * num_programs, 2, row_numbers(tiling)), jnp.float32),
        out=shape((num_parts * num_programs * tiling.rows, head_dim), jnp.float32),
    )
    return plgpu.kernel(
        functools.partial(_kernel, tiling=tiling, is_interpreted=interpret is not None),
        out_type=(shape(inputs.q.shape, dtype), parts),
        scratch_types=shared_types(tiling, dtype, has_sinks=inputs.sinks is not None),
        grid=(inputs.work.tile.shape[0], num_programs),
        grid_names=("item", "program"),
        num_threads=1 + num_consumers(tiling),
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attend_kernel",
        interpret=interpret,
    )(inputs)
