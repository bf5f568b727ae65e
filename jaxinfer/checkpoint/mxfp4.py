"""MXFP4 (OCP Microscaling Formats 1.0, 2023): numbers of four bits in blocks of 32 with a common power of two.

In gpt-oss' files the tensor "w" [experts, inputs, outputs] lies in two of bytes, with the inputs last:

    w_blocks uint8 [experts, outputs, inputs / 32, 16]    two numbers in a byte, the low nibble first
    w_scales uint8 [experts, outputs, inputs / 32]        the exponent of two, plus 127; 255 is NaN

Every number has a place in bfloat16, but for those beyond its largest, which become infinite.
"""

import functools
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_SIZE = 32  # numbers

_BFLOAT16 = jnp.dtype("bfloat16")
_BYTES_PER_BLOCK = BLOCK_SIZE // 2
_BIAS, _NAN = 127, 255
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1 by the three low bits; the highest is the sign

Shape = tuple[int, ...]
Slices = tuple[slice, ...]


def packed_names(names: Iterable[str]) -> list[str]:
    """The tensors that lie packed among those called `names`. Raises ValueError where one has half of what it needs."""
    names = set(names)
    packed = {name.removesuffix(end) for end in (BLOCKS, SCALES) for name in names if name.endswith(end)}
    for name in sorted(packed):
        if missing := [name + end for end in (BLOCKS, SCALES) if name + end not in names]:
            raise ValueError(f"{name} is packed in MXFP4, and {missing[0]} is missing")
        if name in names:
            raise ValueError(f"{name} is there twice: as it is, and packed in MXFP4")
    if not packed:
        raise ValueError(
            f"quantization_config in config.json says mxfp4, and no tensor's name ends in {BLOCKS}; remove it if the "
            f"weights are not packed"
        )
    return sorted(packed)


def unpacked_shape(name: str, blocks: Shape, scales: Shape) -> Shape:
    """Of the tensor `name`, whose blocks and scales have these shapes. Raises ValueError for such as do not fit."""
    if len(blocks) != 4 or blocks[3] != _BYTES_PER_BLOCK or scales != blocks[:3]:
        raise ValueError(
            f"{name}{BLOCKS} has shape {blocks} and {name}{SCALES} {scales}; expected (experts, outputs, blocks, "
            f"{_BYTES_PER_BLOCK}) and the same without its end"
        )
    num_experts, num_outputs, num_blocks, _ = blocks
    return num_experts, num_blocks * BLOCK_SIZE, num_outputs


def read(
    read_blocks: Callable[[Slices], np.ndarray], read_scales: Callable[[Slices], np.ndarray], slices: Slices
) -> np.ndarray:
    """These slices of an unpacked tensor [experts, inputs, outputs] as bfloat16, out of whole blocks.

    One expert at a time, so that what it takes beside its result is small.
    """
    experts, inputs, outputs = slices
    first, last = inputs.start // BLOCK_SIZE, -(-inputs.stop // BLOCK_SIZE)
    cut = slice(inputs.start - first * BLOCK_SIZE, inputs.stop - first * BLOCK_SIZE)
    shape = (experts.stop - experts.start, outputs.stop - outputs.start, inputs.stop - inputs.start)
    unpacked = np.empty(shape, _BFLOAT16)
    for i, expert in enumerate(range(experts.start, experts.stop)):
        where = (slice(expert, expert + 1), outputs, slice(first, last))
        blocks = read_blocks((*where, slice(0, _BYTES_PER_BLOCK)))
        unpacked[i] = dequantize(blocks, read_scales(where))[0, :, cut]
    return unpacked.swapaxes(1, 2)


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 [..., blocks, 16] and uint8 [..., blocks] -> bfloat16 [..., blocks * 32]."""
    pairs = _pairs()[scales[..., None].astype(np.uint16) << 8 | blocks]
    return pairs.view(_BFLOAT16).reshape(*blocks.shape[:-2], -1)


@functools.cache
def _pairs() -> np.ndarray:
    """uint32 [256 * 256]: the two bfloat16 numbers behind each scale and byte, side by side."""
    numbers = np.array([*_MAGNITUDES, *(-number for number in _MAGNITUDES)])
    scaled = np.ldexp(numbers, np.arange(256)[:, None] - _BIAS)
    scaled[_NAN] = np.nan
    with np.errstate(over="ignore"):
        rounded = scaled.astype(_BFLOAT16)
    byte = np.arange(256)
    return np.stack([rounded[:, byte & 15], rounded[:, byte >> 4]], axis=-1).reshape(-1).view(np.uint32)
