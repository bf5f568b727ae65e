"""The arrays of an encoder's step: texts of about one length side by side, padded to a compiled shape. Host only."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.integers import powers, round_up

Array = Any  # NumPy as built here, traced inside a program, abstract while it is compiled

_MIN_LENGTH = 16  # tokens: shorter texts take hardly less time


class EncoderShape(NamedTuple):
    """What distinguishes a compiled step from others."""

    rows: int  # of all data shards
    length: int  # tokens that a row is padded to


class EncoderBatch(NamedTuple):
    """B texts, padded to T tokens. A row that is padding has the length 1, so that there is something to attend to."""

    tokens: Array  # int32 [B, T]
    lengths: Array  # int32 [B]


@dataclasses.dataclass(frozen=True)
class EncoderBuckets:
    """Every shape that is compiled.

    Attributes:
      rows: numbers of rows, ascending, by the length that they are padded to, ascending.
    """

    rows: Mapping[int, tuple[int, ...]]

    @classmethod
    def create(
        cls, *, max_rows: int, max_model_len: int, max_num_batched_tokens: int, num_shards: int
    ) -> "EncoderBuckets":
        """Lengths by powers of two, rows of four: `max_rows` of a data shard, if they have so few tokens, else fewer.

        A text is read as a whole, so there is always room for one in each shard.
        """

        def rows(length: int) -> tuple[int, ...]:
            most = max(1, min(max_rows, max_num_batched_tokens // length))
            return tuple(num_shards * n for n in powers(1, most, 4))

        return cls({length: rows(length) for length in powers(_MIN_LENGTH, max_model_len, 2)})

    def shapes(self) -> list[EncoderShape]:
        return [EncoderShape(rows, length) for length, of_length in self.rows.items() for rows in of_length]

    def plan(self, lengths: Sequence[int]) -> list[tuple[EncoderShape, list[int]]]:
        """The steps for texts of these lengths: of each its shape, and the places of its texts in the list."""
        by_length: dict[int, list[int]] = {}
        for place in sorted(range(len(lengths)), key=lengths.__getitem__):
            by_length.setdefault(round_up(lengths[place], tuple(self.rows)), []).append(place)
        steps = []
        for length, places in by_length.items():
            most = self.rows[length][-1]
            for start in range(0, len(places), most):
                of_step = places[start : start + most]
                steps.append((EncoderShape(round_up(len(of_step), self.rows[length]), length), of_step))
        return steps


def build(shape: EncoderShape, texts: Sequence[Sequence[int]]) -> EncoderBatch:
    """The arrays of the token ids of some texts, which fit into `shape`."""
    tokens, lengths = np.zeros(shape, np.int32), np.ones(shape.rows, np.int32)
    for row, token_ids in enumerate(texts):
        tokens[row, : len(token_ids)] = token_ids
        lengths[row] = len(token_ids)
    return EncoderBatch(tokens, lengths)
