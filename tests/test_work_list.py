"""What the programs of a paged kernel are given to do, by counting."""

from collections import Counter

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import work_list
from tests.long_campaign import IS_LONG

pytestmark = pytest.mark.any_device

Blocks = list[list[tuple[int, int]]]  # of each sequence's tokens: the first that it sees, and the one behind the last


@st.composite
def sequences(draw: st.DrawFn) -> Blocks:
    first = st.integers(0, 40)
    of_token = st.builds(lambda begin, count: (begin, begin + count), first, st.integers(0, 60))
    return draw(st.lists(st.lists(of_token, max_size=9), min_size=1, max_size=5))


@hypothesis.settings(max_examples=200 if IS_LONG else 24, deadline=None)
@hypothesis.given(sequences(), st.integers(0, 5), st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(1, 5))
def test_every_token_meets_each_block_it_sees_once(
    tokens: Blocks, padding: int, tile_tokens: int, extra_items: int, min_blocks: int
):
    lengths = [len(of_sequence) for of_sequence in tokens]
    seen = [pair for of_sequence in tokens for pair in of_sequence] + [(0, 0)] * padding
    if not seen:
        return
    first, end = np.array(seen, np.int32).T
    sizes = {"tile_tokens": tile_tokens, "extra_items": extra_items, "min_blocks": min_blocks}
    work = jax.jit(lambda *arrays: work_list.make(*arrays, **sizes))(np.array(lengths, np.int32), first, end)
    tiles, items = jax.tree.map(np.asarray, work)
    assert len(items.part) == len(tiles.num_parts) + extra_items

    sequence_of = [i for i, length in enumerate(lengths) for _ in range(length)]
    met, parts, programs = Counter(), Counter(), Counter()
    for item in zip(*items, strict=True):
        tile, sequence, first_token, num_tokens, first_block, end_block, part = item
        assert num_tokens == 0 or (first_token, num_tokens) == (tiles.first_token[tile], tiles.num_tokens[tile])
        of_item = range(first_token, first_token + num_tokens)
        programs.update(of_item)
        met.update((token, block) for token in of_item for block in range(first_block, end_block))
        assert {sequence_of[token] for token in of_item if token < sum(lengths)} <= {sequence}
        if num_tokens and part >= 0:
            parts[part] += 1
    wanted = {(token, block) for token, (begin, stop) in enumerate(seen) for block in range(begin, stop)}
    assert wanted <= set(met) and set(met.values()) <= {1}
    assert set(programs) == set(range(len(seen)))  # padding and what sees nothing too: it gets zeros
    assert set(parts) == set(range(len(parts))) and set(parts.values()) <= {1}
    assert len(parts) <= work_list.max_num_parts(extra_items)

    merged = Counter()
    for first_token, num_tokens, first_part, num_parts in zip(*tiles, strict=True):
        assert num_parts != 1
        merged.update(range(first_part, first_part + num_parts))
        of_tile = range(first_token, first_token + num_tokens) if num_parts else ()
        assert all(programs[token] == num_parts for token in of_tile)
    assert merged == parts


def test_work_is_shared_evenly():
    """A long sequence among short ones is of many items, and one that is short enough of one."""
    lengths, end = jnp.ones(5, jnp.int32), jnp.array([1000, 3, 10, 0, 7], jnp.int32)
    sizes = {"tile_tokens": 1, "extra_items": 20, "min_blocks": 4}
    tiles, items = jax.tree.map(np.asarray, work_list.make(lengths, jnp.zeros_like(end), end, **sizes))
    assert tiles.num_parts.tolist() == [20, 0, 0, 0, 0]
    assert (items.end_block - items.first_block)[items.num_tokens > 0].tolist() == [51] * 19 + [31, 3, 10, 0, 7]
