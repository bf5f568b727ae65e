"""Attention of sequences of different lengths by one that wants equally many tokens of each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.ragged import max_num_tiles, token_places


def attend_by_tiles(
    q: jax.Array,  # [S, N, H]
    block_tables: jax.Array,  # int32 [C, M]
    starts: jax.Array,  # int32 [C]
    lengths: jax.Array,  # int32 [C]
    tile: int,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Attention of sequences' new tokens by one that wants equally many of each -> [S, N, H].

    Sequence c has its new tokens at positions starts[c], ..., starts[c] + lengths[c] - 1. They are cut into tiles of
    `tile` tokens, each with its sequence's block table, and the tiles are the rows of
    `attend(q [W, tile, N, H], block_tables [W, M], positions [W, tile]) -> [W, tile, N, H]`; so no sequence
    reads another's pages, not even to multiply them by zero.
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
    out = attend(q[token], block_tables[tiles.sequence], positions)
    place = token_places(lengths, num_tokens)
    num_before = jnp.cumsum(-(-lengths // tile)) - -(-lengths // tile)  # tiles of the sequences before
    return out.reshape(-1, *out.shape[2:]).at[num_before[place.sequence] * tile + place.offset].get(mode="clip")
