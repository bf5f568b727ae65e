"""The arrays of one step: host lists to NumPy, padded to a compiled shape.

Three types, one owner each: `scheduler` makes a StepPlan (requests and ints), this module the StepBatch,
`runner` moves it to the devices. Everything is grouped by data shard, the first dimension D. Of each shard come R
rows: those that decode, padded to a bucket, and then, in a step that prefills, one more for the chunk of a prompt.
A row that is padding uses the scratch slot and the scratch page, and generates nothing.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.request import MAX_STOP_TOKEN_IDS, Request
from jaxinfer.sampling import SamplingArrays
from jaxinfer.scheduler import Chunk, StepPlan, cdiv

Array = Any  # NumPy as built here, traced inside a program, abstract while it is compiled


class ChunkArrays(NamedTuple):
    """The piece of a prompt that each shard prefills: T tokens, of which the first `length` count."""

    tokens: Array  # int32 [D, T]
    start: Array  # int32 [D]; position of the first
    length: Array  # int32 [D]; 0 where the shard prefills nothing


class StepBatch(NamedTuple):
    """R rows of each of D data shards over M pages. The last row is the chunk's, if there is a chunk."""

    slots: Array  # int32 [D, R]; where the row's last token is kept; -1 for padding
    positions: Array  # int32 [D, R]; of the row's last token, which the next one comes after
    num_remaining: Array  # int32 [D, R]; tokens that the row may still generate; 0 for padding
    stop_token_ids: Array  # int32 [D, R, MAX_STOP_TOKEN_IDS]; -1 where unused, which no token is
    block_tables: Array  # int32 [D, R, M]
    sampling: SamplingArrays  # of D * R rows
    chunk: ChunkArrays | None


class StepShape(NamedTuple):
    """What distinguishes a compiled step from others."""

    chunk_tokens: int  # 0: none is prefilled
    rows: int  # per data shard; 0: none decodes
    pages: int
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Every shape that is compiled. One list each, ascending.

    Attributes:
      rows: decode rows per data shard.
      pages: pages per sequence that a decode step attends over.
      chunk_pages: pages per sequence that a step with a chunk attends over.
      chunk_tokens: tokens of a prompt's chunk.
      page_size: tokens per page.
      decode_steps: tokens of each row in a step without a chunk when nobody waits.
      num_shards: data shards.
    """

    rows: tuple[int, ...]
    pages: tuple[int, ...]
    chunk_pages: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    page_size: int
    decode_steps: int
    num_shards: int

    @classmethod
    def create(
        cls, *, max_rows: int, max_model_len: int, max_chunk: int, page_size: int, decode_steps: int, num_shards: int
    ) -> "Buckets":
        """Rows by powers of two, chunks (from 32) of four; contexts (from 128 tokens) of two, with a chunk of four."""

        def pages(factor: int) -> tuple[int, ...]:
            return tuple(dict.fromkeys(cdiv(n, page_size) for n in _powers(128, max_model_len, factor)))

        return cls(
            rows=_powers(1, max_rows, 2),
            pages=pages(2),
            chunk_pages=pages(4),
            chunk_tokens=_powers(32, min(max_chunk, max_model_len), 4),
            page_size=page_size,
            decode_steps=decode_steps,
            num_shards=num_shards,
        )

    @property
    def rows_beside_chunk(self) -> int:
        """Of a step with a chunk. All of them: idle ones cost little there, and less is compiled than with a choice."""
        return self.rows[-1] if self.rows[-1] * self.num_shards > 1 else 0  # an only slot prefills or decodes

    def shapes(self) -> list[StepShape]:
        """Every shape that a step can have, those of a first request first."""
        chunks = [
            StepShape(tokens, self.rows_beside_chunk, pages, 1)
            for tokens in self.chunk_tokens
            for pages in self.chunk_pages
            if pages >= self._chunk_pages(tokens)
        ]
        decode = [StepShape(0, rows, pages, self.decode_steps) for rows in self.rows for pages in self.pages]
        single = [StepShape(0, self.rows[-1], pages, 1) for pages in self.pages] if self.rows_beside_chunk else []
        return list(dict.fromkeys((*chunks, *decode, *single)))

    def shape(self, plan: StepPlan) -> StepShape:
        """The smallest compiled shape that holds a plan."""
        ends = [start + plan.num_steps for starts in plan.starts for start in starts]
        chunks = [chunk for chunk in plan.chunks if chunk is not None]
        if chunks:
            tokens = _round_up(max(chunk.stop - chunk.start for chunk in chunks), self.chunk_tokens)
            pages = self._chunk_pages(max(tokens, *(chunk.stop for chunk in chunks), *ends))
            return StepShape(tokens, self.rows_beside_chunk, pages, 1)
        rows = self.rows[-1] if plan.num_steps < self.decode_steps else max(map(len, plan.rows))
        end = min(max(ends), self.pages[-1] * self.page_size)  # a row may end within the step
        pages = _round_up(cdiv(end, self.page_size), self.pages)
        return StepShape(0, _round_up(rows, self.rows), pages, plan.num_steps)

    def _chunk_pages(self, num_tokens: int) -> int:
        return _round_up(cdiv(num_tokens, self.page_size), self.chunk_pages)


def build(plan: StepPlan, shape: StepShape) -> StepBatch:
    """The arrays of a plan, whose shape is `Buckets.shape(plan)`."""
    has_chunk = shape.chunk_tokens > 0
    num_shards, num_rows = len(plan.rows), shape.rows + has_chunk
    requests: list[Request | None] = []
    for rows, chunk in zip(plan.rows, plan.chunks, strict=True):
        requests += rows + [None] * (shape.rows - len(rows))
        requests += [chunk.request if chunk else None] if has_chunk else []
    positions, num_remaining = np.zeros((2, len(requests)), np.int32)
    slots = np.full(len(requests), -1, np.int32)
    stop_token_ids = np.full((len(requests), MAX_STOP_TOKEN_IDS), -1, np.int32)
    block_tables = np.zeros((len(requests), shape.pages), np.int32)
    for row, request in enumerate(requests):
        if request is not None:
            slots[row] = request.slot
            stop_token_ids[row, : len(request.stop_token_ids)] = request.stop_token_ids
            pages = request.page_ids[: shape.pages]
            block_tables[row, : len(pages)] = pages
    for shard, (rows, starts, chunk) in enumerate(zip(plan.rows, plan.starts, plan.chunks, strict=True)):
        first = shard * num_rows
        positions[first : first + len(rows)] = starts
        limits = [request.max_num_cached for request in rows]
        num_remaining[first : first + len(rows)] = np.array(limits, np.int32) - positions[first : first + len(rows)]
        if chunk is not None:
            positions[first + shape.rows] = chunk.stop - 1
            num_remaining[first + shape.rows] = chunk.request.max_num_tokens - chunk.stop if chunk.is_last else 0

    def by_shard(x: np.ndarray) -> np.ndarray:
        return x.reshape(num_shards, num_rows, *x.shape[1:])

    return StepBatch(
        slots=by_shard(slots),
        positions=by_shard(positions),
        num_remaining=by_shard(num_remaining),
        stop_token_ids=by_shard(stop_token_ids),
        block_tables=by_shard(block_tables),
        sampling=_sampling(requests),
        chunk=_chunk_arrays(plan.chunks, shape.chunk_tokens) if has_chunk else None,
    )


def _chunk_arrays(chunks: list[Chunk | None], num_tokens: int) -> ChunkArrays:
    tokens = np.zeros((len(chunks), num_tokens), np.int32)
    start, length = np.zeros((2, len(chunks)), np.int32)
    for shard, chunk in enumerate(chunks):
        if chunk is not None:
            start[shard], length[shard] = chunk.start, chunk.stop - chunk.start
            tokens[shard, : length[shard]] = chunk.request.token_ids[chunk.start : chunk.stop]
    return ChunkArrays(tokens, start, length)


def _sampling(rows: list[Request | None]) -> SamplingArrays:
    params = [request.params if request else None for request in rows]
    temperature = np.array([p.temperature if p else 0.0 for p in params], np.float32)
    top_k = np.array([max(p.top_k, 0) if p else 0 for p in params], np.int32)
    top_p = np.array([p.top_p if p else 1.0 for p in params], np.float32)
    min_p = np.array([p.min_p if p else 0.0 for p in params], np.float32)
    return SamplingArrays(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=np.array([request.seed if request else 0 for request in rows], np.uint32),
        # Decided here, because on a mesh with `data` asking every row would be an all-reduce per token.
        draws=np.array(np.any(temperature > 0)),
        truncates=np.array(np.any((top_k > 0) | (top_p < 1) | (min_p > 0))),
    )


def _powers(first: int, last: int, factor: int) -> tuple[int, ...]:
    """first, first * factor, ... below last, then last itself."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)


def _round_up(size: int, buckets: tuple[int, ...]) -> int:
    for bucket in buckets:
        if size <= bucket:
            return bucket
    raise RuntimeError(f"size {size} is beyond the largest compiled shape, {buckets[-1]}")
