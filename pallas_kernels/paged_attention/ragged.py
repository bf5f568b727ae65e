"""Attention of sequences of different lengths by one that wants equally many tokens of each."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.ragged import max_num_tiles, token_places

T = TypeVar("T")


def attend_by_tiles(
    q: jax.Array,  # [S, N, H]
    tables: Any,  # arrays [C, M], such as block tables
    starts: jax.Array,  # int32 [C]
    lengths: jax.Array,  # int32 [C]
    tile: int,
    attend: Callable[[jax.Array, Any, jax.Array], T],
) -> T:
    """Attention of sequences' new tokens by one that wants equally many of each -> arrays [S, ...].

    Sequence c has its new tokens at positions starts[c], ..., starts[c] + lengths[c] - 1. They are cut into tiles of
    `tile` tokens, each with its sequence's tables, and the tiles are the rows of
    `attend(q [W, tile, N, H], tables [W, M], positions [W, tile]) -> [W, tile, ...]`; so no sequence reads
    another's pages, not even to multiply them by zero.
    """
    num_tokens, num_sequences = q.shape[0], lengths.shape[0]
    tile = min(tile, num_tokens)
    num_tiles = max_num_tiles(num_tokens, num_sequences, tile)
    tiles = token_places(-(-lengths // tile), num_tiles)
    offset = tiles.offset[:, None] * tile + jnp.arange(tile, dtype=jnp.int32)
    valid = tiles.valid[:, None] & (offset < lengths[tiles.sequence][:, None])
    first_token = (jnp.cumsum(lengths) - lengths)[tiles.sequence][:, None]
    token = jnp.where(valid, first_token + offset, 0)
    positions = jnp.where(valid, starts[tiles.sequence][:, None] + offset, -1)
    outs = attend(q[token], jax.tree.map(lambda table: table[tiles.sequence], tables), positions)
    place = token_places(lengths, num_tokens)
    num_before = jnp.cumsum(-(-lengths // tile)) - -(-lengths // tile)  # tiles of the sequences before
    rows = num_before[place.sequence] * tile + place.offset
    return jax.tree.map(lambda out: out.reshape(-1, *out.shape[2:]).at[rows].get(mode="clip"), outs)
