"""Cuts a step into the microbatches of a pipeline: rows and prompts' tokens of each data shard in so many equal parts.

A step without stages is one microbatch, of everything. Parts are padded at the end of the last ones.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.attention import Prompts, Rows
from jaxinfer.integers import cdiv
from pallas_kernels.ragged import token_places


class Work(NamedTuple):
    """What a stage needs to know of the tokens of a microbatch, which are those of rows, then those of prompts."""

    positions: jax.Array  # int32 [D, S]
    rows: Rows | None
    prompts: Prompts | None

    @property
    def is_valid(self) -> jax.Array:
        """bool [D, S]; false for padding."""
        of_rows = [] if self.rows is None else [self.rows.valid]
        if self.prompts is not None:
            num_tokens = self.positions.shape[1] - sum(valid.shape[1] for valid in of_rows)
            place = jax.vmap(functools.partial(token_places, num_tokens=num_tokens))(self.prompts.lengths)
            of_rows.append(place.valid)
        return jnp.concatenate(of_rows, axis=1)

    def masked(self, counts: jax.Array) -> "Work":
        """The same where bool `counts` is true; else everything is padding."""
        rows = self.rows and self.rows._replace(valid=self.rows.valid & counts)
        prompts = self.prompts and self.prompts._replace(lengths=jnp.where(counts, self.prompts.lengths, 0))
        return Work(self.positions, rows, prompts)


def split(array: jax.Array, num_parts: int) -> jax.Array:
    """[D, R, ...] -> [parts, D, R / parts, ...], padded with zeros."""
    if num_parts == 1:
        return array[None]
    size = cdiv(array.shape[1], num_parts)
    padding = [(0, 0), (0, size * num_parts - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
    return jnp.moveaxis(jnp.pad(array, padding).reshape(array.shape[0], num_parts, size, *array.shape[2:]), 1, 0)


def merge(parts: jax.Array, size: int) -> jax.Array:
    """The other way: [parts, D, R / parts, ...] -> [D, R, ...], of which the first `size` are no padding."""
    together = jnp.moveaxis(parts, 0, 1)
    return together.reshape(together.shape[0], -1, *parts.shape[3:])[:, :size]


def split_prompts(prompts: Prompts, num_tokens: int, num_parts: int) -> Prompts:
    """The part of each prompt that is in each part of `num_tokens` tokens [D, T]; a part has some of none."""
    if num_parts == 1:
        return jax.tree.map(lambda a: a[None], prompts)
    size = cdiv(num_tokens, num_parts)
    first = jnp.arange(num_parts, dtype=jnp.int32)[:, None, None] * size
    offsets = jnp.cumsum(prompts.lengths, axis=1, dtype=jnp.int32) - prompts.lengths
    start, stop = (jnp.clip(edge - offsets, 0, prompts.lengths) for edge in (first, first + size))
    tables = jnp.broadcast_to(prompts.block_tables, (num_parts, *prompts.block_tables.shape))
    return Prompts(tables, prompts.starts + start, stop - start)


def split_tokens(array: jax.Array, num_rows: int, num_parts: int) -> jax.Array:
    """[D, S, ...], of rows and then of prompts' tokens -> [parts, D, of each part rows and then tokens, ...]."""
    if num_parts == 1:
        return array[None]
    return jnp.concatenate([split(array[:, :num_rows], num_parts), split(array[:, num_rows:], num_parts)], axis=2)


def merge_tokens(parts: jax.Array, num_rows: int, num_tokens: int) -> jax.Array:
    """The other way -> [D, rows and then tokens, ...]."""
    if len(parts) == 1:
        return parts[0]
    of_part = cdiv(num_rows, len(parts))
    return jnp.concatenate([merge(parts[:, :, :of_part], num_rows), merge(parts[:, :, of_part:], num_tokens)], axis=1)
