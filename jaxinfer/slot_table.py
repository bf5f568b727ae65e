"""What a step needs to know of the sequences that run, by slot: written when it changes, gathered when a step is built.

Host only. So a step costs a few array operations, and no walk over what every request has and never changes.
"""

from typing import NamedTuple

import numpy as np

from jaxinfer.request import MAX_STOP_TOKEN_IDS, Request

# Of SamplingParams, and what stands for nobody: dtype and value.
_SAMPLING = {
    "temperature": (np.float32, 0.0),
    "top_k": (np.int32, 0),
    "top_p": (np.float32, 1.0),
    "min_p": (np.float32, 0.0),
    "seed": (np.uint32, 0),
}


class RowConstants(NamedTuple):
    """Of R rows of each of D shards."""

    stop_token_ids: np.ndarray  # int32 [D, R, MAX_STOP_TOKEN_IDS]
    sampling: dict[str, np.ndarray]  # [D * R] each, and whether any row draws or truncates: `SamplingArrays`


class SlotTable:
    """Rows for the S slots of each of D data shards, and one more per shard that is never written: padding.

    A slot whose prompt is still being prefilled has pages and sampling parameters; it has no position yet.

    Attributes:
      positions: int32 [D, S + 1]; of the token that a slot generates next, when the steps under way are done.
      limits: int32 [D, S + 1]; what `positions` stays below: tokens that may be in the cache; 0 if it does not decode.
      num_pages: int32 [D, S + 1].
      block_tables: int32 [D, S + 1, M]; the ids of a slot's pages, in order of position, then zeros.
      stop_token_ids: int32 [D, S + 1, MAX_STOP_TOKEN_IDS]; -1 where unused, which no token is.
      sampling: [D, S + 1] each: temperature, top_k (0: all), top_p, min_p, seed.
    """

    def __init__(self, num_shards: int, num_slots: int, max_pages: int):
        rows = (num_shards, num_slots + 1)
        self.positions, self.limits, self.num_pages = np.zeros((3, *rows), np.int32)
        self.block_tables = np.zeros((*rows, max_pages), np.int32)
        self.stop_token_ids = np.full((*rows, MAX_STOP_TOKEN_IDS), -1, np.int32)
        self.sampling = {name: np.full(rows, value, dtype) for name, (dtype, value) in _SAMPLING.items()}
        self._gathered: tuple[np.ndarray, RowConstants] | None = None  # the last slots asked for, and what was found

    def put(self, shard: int, slot: int, request: Request) -> None:
        """Writes what never changes of a request that starts."""
        params, stop_token_ids = request.params, request.stop_token_ids
        self.stop_token_ids[shard, slot] = -1
        self.stop_token_ids[shard, slot, : len(stop_token_ids)] = stop_token_ids
        values = (params.temperature, max(params.top_k, 0), params.top_p, params.min_p, request.seed)
        for column, value in zip(self.sampling.values(), values, strict=True):
            column[shard, slot] = value
        self._gathered = None

    def constants(self, slots: np.ndarray) -> RowConstants:
        """What never changes of rows in `slots` int32 [D, R]: where nothing did, the arrays of the last call."""
        if self._gathered is None or not np.array_equal(self._gathered[0], slots):
            rows = (np.arange(len(slots))[:, None], slots)  # slot -1: the last row, which is padding
            sampling = {name: column[rows].reshape(-1) for name, column in self.sampling.items()}
            # Decided here, because on a mesh with `data` asking every row would be an all-reduce per token.
            sampling["draws"] = np.array(np.any(sampling["temperature"] > 0))
            cuts = (sampling["top_k"] > 0) | (sampling["top_p"] < 1) | (sampling["min_p"] > 0)
            sampling["truncates"] = np.array(np.any(cuts))
            self._gathered = slots, RowConstants(self.stop_token_ids[rows], sampling)
        return self._gathered[1]

    def clear(self, shard: int, slot: int) -> None:
        """Nobody is there any more."""
        self.block_tables[shard, slot, : self.num_pages[shard, slot]] = 0
        for column in (self.positions, self.limits, self.num_pages):
            column[shard, slot] = 0
