"""Sequences of different lengths, their tokens one after the other in one array; what is behind the last is padding.

lengths [2, 3], 7 tokens: the sequences 0 0 1 1 1 and two tokens of padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenPlaces(NamedTuple):
    """Where each of S tokens belongs. Padding is in the last sequence, at offset 0."""

    sequence: jax.Array  # int32 [S]
    offset: jax.Array  # int32 [S]; within the sequence
    valid: jax.Array  # bool [S]; false for padding


def token_places(lengths: jax.Array, num_tokens: int) -> TokenPlaces:
    """Of `num_tokens` tokens of sequences of int32 `lengths` [C]."""
    ends = jnp.cumsum(lengths, dtype=jnp.int32)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.sum(token[:, None] >= ends, axis=1, dtype=jnp.int32), lengths.shape[0] - 1)
    valid = token < ends[-1]
    return TokenPlaces(sequence, jnp.where(valid, token - (ends - lengths)[sequence], 0), valid)


def token_positions(starts: jax.Array, lengths: jax.Array, num_tokens: int) -> jax.Array:
    """Of tokens of sequences that go on from int32 `starts` [C] -> int32 [S]; -1 of padding."""
    place = token_places(lengths, num_tokens)
    return jnp.where(place.valid, starts[place.sequence] + place.offset, -1)


def max_num_tiles(num_tokens: int, num_sequences: int, tile: int) -> int:
    """How many tiles `num_tokens` tokens of so many sequences may take."""
    with_tokens = min(num_sequences, num_tokens)
    return (num_tokens + with_tokens * (tile - 1)) // tile
