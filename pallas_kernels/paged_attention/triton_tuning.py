"""The settings of the kernels of `triton.py`: as measured on a device, else what any GPU since Ampere has room for."""

import dataclasses
from typing import Any

from pallas_kernels import tuning
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiling import Tuning
from pallas_kernels.triton_launch import MIN_DOT, SHARED_BYTES

DEFAULTS = {  # by kind of step; `_that_fits` makes them smaller
    "decode": Tuning(max_rows=64, block_tokens=64, extra_items=128, min_blocks=4, num_warps=4, num_stages=3),
    "prefill": Tuning(max_rows=128, block_tokens=64, extra_items=32, min_blocks=16, num_warps=8, num_stages=2),
}
_THREAD_NUMBERS = {2: 128, 4: 16}  # by itemsize, of what comes out, in 255 registers; float32 needs them for operands


def tuning_of(spec: AttentionSpec, kind: str, itemsize: int) -> Tuning:
    """Of a `kind` of step in `DEFAULTS`, where queries have `itemsize` bytes for a number."""
    if measured := tuning.settings(kernel(kind), spec.device_kind, tuned_for(spec, itemsize)):
        return Tuning(**measured)
    return _that_fits(DEFAULTS[kind], kind, spec, itemsize)


def kernel(kind: str) -> str:
    """Its name in `pallas_kernels.tuning`."""
    return f"paged_attention/triton/{kind}"


def tuned_for(spec: AttentionSpec, itemsize: int) -> dict[str, Any]:
    """By what calls differ that want different settings."""
    sizes = {"head_dim": spec.head_dim, "value_dim": spec.value_dim, "group_size": spec.group_size}
    return sizes | {"itemsize": itemsize, "cache_dtype": spec.cache_dtype}


def _that_fits(tuning: Tuning, kind: str, spec: AttentionSpec, itemsize: int) -> Tuning:
    """With blocks that fit into shared memory and rows that fit into registers.

    Numbers of 8 bits are there as they are loaded, and once more as they are multiplied; and so are queries then, as
    many ones are in any case.
    """
    rows, block_tokens = tuning.max_rows, tuning.block_tokens
    loaded_bytes, converted_bytes = (1, itemsize * spec.head_dim) if spec.cache_dtype else (itemsize, 0)
    token_bytes = tuning.num_stages * loaded_bytes * spec.token_numbers // spec.num_kv_heads + converted_bytes
    row_bytes = itemsize * spec.head_dim if spec.cache_dtype or kind == "prefill" else 0
    most_numbers = tuning.num_warps * 32 * _THREAD_NUMBERS[itemsize]
    while rows > MIN_DOT and (rows * spec.out_dim > most_numbers or rows * row_bytes > SHARED_BYTES // 2):
        rows //= 2
    while block_tokens > MIN_DOT and block_tokens * token_bytes > SHARED_BYTES - rows * row_bytes:
        block_tokens //= 2
    return dataclasses.replace(tuning, max_rows=rows, block_tokens=block_tokens)
