"""Attention over some of a sequence's pages, and how it becomes attention over all of them.

A softmax over parts is exact (Milakov and Gimelshein, arXiv:1805.02867): every part counts its weights from its own
largest score on, and is rescaled to the largest of all when the parts come together (DistAttention, arXiv:2401.02669).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class PartialSoftmax(NamedTuple):
    """Of each query and head, over the pages that somebody has. float32, [..., N], and [..., N, H] of `out`."""

    largest: jax.Array  # score, without sinks; -inf where none is seen
    total: jax.Array  # of exp(score - largest)
    out: jax.Array  # the same times the values


def merge(part: PartialSoftmax, axis_names: tuple[str, ...], sinks: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """The attention of which every device along mesh axes `axis_names` has a part -> [..., N, H] in `dtype`, on all.

    For use inside `shard_map`. Two all-reduces: of `largest`, and of the other two in one array. For S queries of N
    heads on a device they are of S * N * 4 and S * N * (H + 1) * 4 bytes: of S * N * (H + 2) * 4 together, however long
    the sequences are. `sinks` [N] are here and not in the parts, so that each counts once.
    """
    largest = lax.pmax(part.largest, axis_names)
    if sinks is not None:
        largest = jnp.maximum(largest, sinks.astype(jnp.float32))
    largest = jnp.where(largest > -jnp.inf, largest, 0)  # of a query that sees nothing anywhere
    kept = jnp.exp(part.largest - largest)[..., None]
    sums = lax.psum(jnp.concatenate([part.out, part.total[..., None]], axis=-1) * kept, axis_names)
    out, total = sums[..., :-1], sums[..., -1]
    if sinks is not None:
        total += jnp.exp(sinks.astype(jnp.float32) - largest)
    return (out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]).astype(dtype)
