"""What the pages of a cache hold: numbers as queries have them, or numbers of 8 bits and their scales.

A token's keys, or values, of a KV head are quantised by themselves: their largest becomes the largest number that 8
bits have. So scales need no calibration, and a token's pages are the same whichever tokens are written beside it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LARGEST = {"int8": 127, "float8_e4m3fn": 448}  # number of each dtype that pages are quantised to
SCALE_BYTES = 4


class QuantizedPages(NamedTuple):
    """Numbers are values * scales. What was not finite makes its scale so, which 8 bits cannot always say."""

    values: jax.Array  # int8 or float8_e4m3fn [P, K, page_size, H]
    scales: jax.Array  # float32 [P, K, page_size]


Pages = jax.Array | QuantizedPages  # [P, K, page_size, H]


def quantize(x: jax.Array, dtype: Any) -> QuantizedPages:
    """Numbers [..., H] to the nearest in `dtype`, with scales float32 [...] of which none is too small for a number."""
    x, dtype = x.astype(jnp.float32), jnp.dtype(dtype)
    largest = LARGEST[dtype.name]
    scales = jnp.max(jnp.abs(x), axis=-1) / largest
    values = x / jnp.where(scales > 0, scales, 1)[..., None]
    if dtype == jnp.int8:
        values = jnp.round(values)
    return QuantizedPages(jnp.clip(values, -largest, largest).astype(dtype), scales)


def values_and_scales(pages: Any) -> tuple[Any, Any]:
    """Of what is made as `Pages` are: scales are None where values are the numbers."""
    return pages if isinstance(pages, QuantizedPages) else (pages, None)


def product_dtype(q_dtype: jnp.dtype, cache_dtype: str | None) -> jnp.dtype:
    """In which weights are multiplied with values.

    With scales the weights may be smaller than what float16 has; values of 8 bits are exact in bfloat16 too.
    """
    return jnp.dtype(jnp.bfloat16) if cache_dtype and q_dtype == jnp.float16 else q_dtype
