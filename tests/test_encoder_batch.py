"""How texts are put side by side for an encoder."""

import numpy as np
import pytest

from jaxinfer import encoder_batch
from jaxinfer.encoder_batch import EncoderBuckets, EncoderShape


def test_rows_are_as_many_as_tokens_allow_and_at_least_one():
    buckets = EncoderBuckets.create(max_rows=32, max_model_len=512, max_num_batched_tokens=256, num_shards=1)
    assert buckets.rows == {16: (1, 4, 16), 32: (1, 4, 8), 64: (1, 4), 128: (1, 2), 256: (1,), 512: (1,)}
    assert len(buckets.shapes()) == len(set(buckets.shapes())) == 12


@pytest.mark.parametrize(("max_model_len", "lengths"), [(8, [8]), (16, [16]), (17, [16, 17]), (100, [16, 32, 64, 100])])
def test_the_longest_text_is_not_padded(max_model_len: int, lengths: list[int]):
    buckets = EncoderBuckets.create(max_rows=1, max_model_len=max_model_len, max_num_batched_tokens=16, num_shards=1)
    assert [*buckets.rows] == lengths


def test_rows_are_for_every_data_shard():
    buckets = EncoderBuckets.create(max_rows=8, max_model_len=32, max_num_batched_tokens=64, num_shards=2)
    assert buckets.rows == {16: (2, 8), 32: (2, 4)}


@pytest.mark.parametrize("seed", range(20))
def test_every_text_is_read_once_in_a_compiled_shape_that_holds_it(seed: int):
    random = np.random.RandomState(seed)
    buckets = EncoderBuckets.create(
        max_rows=random.randint(1, 20),
        max_model_len=100,
        max_num_batched_tokens=random.randint(1, 300),
        num_shards=random.randint(1, 4),
    )
    lengths = random.randint(1, 101, random.randint(0, 60)).tolist()
    steps = buckets.plan(lengths)
    assert sorted(place for _, places in steps for place in places) == [*range(len(lengths))]
    for shape, places in steps:
        assert shape in buckets.shapes() and len(places) <= shape.rows
        for place in places:  # and no shorter shape would hold it
            assert shape.length == min(length for length in buckets.rows if length >= lengths[place])


def test_padding_is_a_text_of_one_token():
    batch = encoder_batch.build(EncoderShape(3, 4), [[7, 8], [9]])
    np.testing.assert_array_equal(batch.tokens, [[7, 8, 0, 0], [9, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.lengths, [2, 1, 1])
    assert batch.tokens.dtype == batch.lengths.dtype == np.int32
