"""Who computes what in a kernel whose grid is fixed while the sequences' lengths are not: made on the device.

New tokens are cut into tiles, each of consecutive ones of a sequence, and what a tile has to read into items of about
equally many blocks of cached tokens (flash decoding). There is a program for each item there may be, and the last ones
have nothing to do: so one compiled launch serves any lengths, a long sequence is shared by many programs, and a short
one costs what it reads. Layers with the same window have the same list, which XLA computes once for all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ragged import max_num_tiles, token_places


class Tiles(NamedTuple):
    """int32 [T]. A tile that is one item has no parts."""

    first_token: jax.Array
    num_tokens: jax.Array  # 0: is not used
    first_part: jax.Array
    num_parts: jax.Array


class Items(NamedTuple):
    """int32 [I]. Of a tile's sequence the blocks from `first_block` to before `end_block`; there may be none."""

    tile: jax.Array
    sequence: jax.Array
    first_token: jax.Array
    num_tokens: jax.Array  # 0: is not used
    first_block: jax.Array
    end_block: jax.Array
    part: jax.Array  # -1: it is all of its tile


def make(
    lengths: jax.Array,
    first_blocks: jax.Array,
    end_blocks: jax.Array,
    *,
    tile_tokens: int,
    extra_items: int,
    min_blocks: int,
) -> tuple[Tiles, Items]:
    """The work of S tokens: `lengths` int32 [C] of each sequence, one after the other, and then padding.

    Token s sees cached tokens of its sequence in the blocks from first_blocks[s] to end_blocks[s] - 1, both int32 [S];
    none if they are equal. There are `extra_items` more items than tiles, and at least `min_blocks` blocks in all items
    of a tile but the last. Padding gets tiles that see nothing.
    """
    num_tokens = first_blocks.shape[0]
    lengths = jnp.append(lengths, num_tokens - jnp.sum(lengths))
    num_tiles = max_num_tiles(num_tokens, lengths.shape[0], tile_tokens)
    place = token_places(-(-lengths // tile_tokens), num_tiles)
    offset = place.offset * tile_tokens
    first_token = (jnp.cumsum(lengths) - lengths)[place.sequence] + offset
    tokens_of = jnp.where(place.valid, jnp.minimum(lengths[place.sequence] - offset, tile_tokens), 0)

    within = jnp.arange(tile_tokens, dtype=jnp.int32)
    token = jnp.minimum(first_token[:, None] + within, num_tokens - 1)
    sees = (within < tokens_of[:, None]) & (first_blocks < end_blocks)[token]
    end = jnp.max(jnp.where(sees, end_blocks[token], 0), axis=1)
    first = jnp.min(jnp.where(sees, first_blocks[token], end[:, None]), axis=1)

    item_blocks = jnp.maximum(min_blocks, -(-jnp.sum(end - first) // extra_items))
    items_of = jnp.where(tokens_of > 0, jnp.maximum(1, -(-(end - first) // item_blocks)), 0)
    parts_of = jnp.where(items_of > 1, items_of, 0)
    first_part = jnp.cumsum(parts_of) - parts_of
    item = token_places(items_of, num_tiles + extra_items)
    tile = item.sequence
    first_block = first[tile] + item.offset * item_blocks
    items = Items(
        tile=tile,
        sequence=jnp.minimum(place.sequence[tile], lengths.shape[0] - 2),
        first_token=first_token[tile],
        num_tokens=jnp.where(item.valid, tokens_of[tile], 0),
        first_block=first_block,
        end_block=jnp.minimum(first_block + item_blocks, end[tile]),
        part=jnp.where(parts_of[tile] > 0, first_part[tile] + item.offset, -1),
    )
    return Tiles(first_token, tokens_of, first_part, parts_of), items


def max_num_parts(extra_items: int) -> int:
    """Each item is of more than half as many blocks as divided by `extra_items` give, where a tile is in parts."""
    return 2 * extra_items
