"""The arrays of one step: host lists to NumPy, padded to a compiled shape.

Three types, one owner each: `scheduler` makes a StepPlan (requests and ints), this module the StepBatch,
`runner` moves it to the devices. Everything is grouped by data shard, the first dimension D. Of each shard come R
rows: those that decode, padded to a bucket, and then, in a step that prefills, one for each chunk of a prompt. The
tokens of a shard's chunks follow each other, padded at the end only. A row that is padding uses the scratch slot and
the scratch page, and generates nothing.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.integers import cdiv, powers, round_up
from jaxinfer.sampling import SamplingArrays
from jaxinfer.slot_table import SlotTable
from jaxinfer.step_plan import Chunk, StepPlan, num_chunks

Array = Any  # NumPy as built here, traced inside a program, abstract while it is compiled


class ChunkArrays(NamedTuple):
    """The pieces of C prompts that each shard prefills: T tokens, one piece after the other."""

    tokens: Array  # int32 [D, T]
    starts: Array  # int32 [D, C]; position of the first token of each
    lengths: Array  # int32 [D, C]; 0 for padding


class StepBatch(NamedTuple):
    """R rows of each of D data shards over M pages. With chunks, the last C rows are theirs."""

    slots: Array  # int32 [D, R]; where the row's last token is kept; -1 for padding
    positions: Array  # int32 [D, R]; of the row's last token, which the next one comes after
    num_remaining: Array  # int32 [D, R]; tokens that the row may still generate; 0 for padding
    stop_token_ids: Array  # int32 [D, R, MAX_STOP_TOKEN_IDS]; -1 where unused, which no token is
    block_tables: Array  # int32 [D, R, M]
    sampling: SamplingArrays  # of D * R rows
    chunks: ChunkArrays | None


class StepShape(NamedTuple):
    """What distinguishes a compiled step from others."""

    chunk_tokens: int  # of all chunks of a data shard; 0: none is prefilled
    chunks: int  # per data shard
    rows: int  # per data shard; 0: none decodes
    pages: int
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Every shape that is compiled. One list each, ascending.

    Attributes:
      rows: decode rows per data shard.
      pages: pages per sequence that a decode step attends over.
      chunk_pages: pages per sequence that a step with chunks attends over.
      chunk_tokens: tokens of a data shard's chunks together.
      page_size: tokens per page.
      decode_steps: tokens of each row in a step without chunks when nobody waits.
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
        cls,
        *,
        max_rows: int,
        max_model_len: int,
        max_chunk: int,
        page_size: int,
        decode_steps: int,
        num_shards: int,
        min_chunk: int = 32,
    ) -> "Buckets":
        """Rows by powers of two, chunks (from `min_chunk`) of four; contexts of two (from 128 tokens), with chunks of
        four (from 512: there they cost little, and programs take long to compile)."""

        def pages(first: int, factor: int) -> tuple[int, ...]:
            return tuple(dict.fromkeys(cdiv(n, page_size) for n in powers(first, max_model_len, factor)))

        return cls(
            rows=powers(1, max_rows, 2),
            pages=pages(128, 2),
            chunk_pages=pages(512, 4),
            chunk_tokens=chunk_sizes(max_chunk, max_model_len, max_rows, min_chunk),
            page_size=page_size,
            decode_steps=decode_steps,
            num_shards=num_shards,
        )

    @property
    def num_chunks(self) -> int:
        """Of a data shard, at most: C."""
        return num_chunks(self.rows[-1])

    @property
    def rows_beside_chunk(self) -> int:
        """Of a step with chunks. All of them: idle ones cost little there, and less is compiled than with a choice."""
        return self.rows[-1] if self.rows[-1] * self.num_shards > 1 else 0  # an only slot prefills or decodes

    def empty_table(self) -> SlotTable:
        """Of as many slots and pages as the largest of these shapes have."""
        return SlotTable(self.num_shards, self.rows[-1], self.pages[-1])

    def shapes(self) -> list[StepShape]:
        """Every shape that a step can have, those of a first request first."""
        chunks = [
            StepShape(tokens, self.num_chunks, self.rows_beside_chunk, pages, 1)
            for tokens in self.chunk_tokens
            for pages in self.chunk_pages
            if pages >= self._least_pages(tokens)
        ]
        decode = [StepShape(0, 0, rows, pages, self.decode_steps) for rows in self.rows for pages in self.pages]
        single = [StepShape(0, 0, self.rows[-1], pages, 1) for pages in self._single_pages]
        return list(dict.fromkeys((*chunks, *decode, *single)))

    def shape(self, plan: StepPlan) -> StepShape:
        """The smallest compiled shape that holds a plan."""
        end = plan.num_steps + max(starts.max(initial=0).item() for starts in plan.starts)
        if any(plan.chunks):
            tokens = round_up(max(sum(c.num_tokens for c in chunks) for chunks in plan.chunks), self.chunk_tokens)
            stops = [chunk.stop for chunks in plan.chunks for chunk in chunks]
            pages = max(self._least_pages(tokens), self._chunk_pages(max(*stops, end)))
            return StepShape(tokens, self.num_chunks, self.rows_beside_chunk, pages, 1)
        rows = self.rows[-1] if plan.num_steps < self.decode_steps else max(map(len, plan.rows))
        end = min(end, self.pages[-1] * self.page_size)  # a row may end within the step
        buckets = self._single_pages if plan.num_steps < self.decode_steps else self.pages
        pages = round_up(cdiv(end, self.page_size), buckets)
        return StepShape(0, 0, round_up(rows, self.rows), pages, plan.num_steps)

    @property
    def _single_pages(self) -> tuple[int, ...]:
        """Of a step of one token that could be of several. An only slot takes it for the full sampler alone."""
        return self.pages if self.rows_beside_chunk else self.pages[-1:]

    def _least_pages(self, chunk_tokens: int) -> int:
        """Compiled beside so many tokens: enough for one prompt, though there may be several shorter ones."""
        return self._chunk_pages(min(chunk_tokens, self.chunk_pages[-1] * self.page_size))

    def _chunk_pages(self, num_tokens: int) -> int:
        return round_up(cdiv(num_tokens, self.page_size), self.chunk_pages)


def max_chunk_tokens(max_num_batched_tokens: int, max_model_len: int, max_rows: int) -> int:
    """Tokens that the chunks of a data shard can have together in a step."""
    return min(max_num_batched_tokens, max_model_len * num_chunks(max_rows))


def chunk_sizes(max_num_batched_tokens: int, max_model_len: int, max_rows: int, smallest: int) -> tuple[int, ...]:
    """To which the chunks of a data shard are padded together, ascending."""
    return powers(smallest, max_chunk_tokens(max_num_batched_tokens, max_model_len, max_rows), 4)


def build(plan: StepPlan, shape: StepShape, table: SlotTable) -> StepBatch:
    """The arrays of a plan, whose shape is `Buckets.shape(plan)`."""
    rows = (len(plan.rows), shape.rows + shape.chunks)
    slots = np.full(rows, -1, np.int32)
    positions, limits = np.zeros((2, *rows), np.int32)
    for shard, (decoding, starts, chunks) in enumerate(zip(plan.slots, plan.starts, plan.chunks, strict=True)):
        slots[shard, : len(decoding)] = decoding
        positions[shard, : len(decoding)] = starts
        limits[shard, : len(decoding)] = table.limits[shard, decoding]
        for row, chunk in enumerate(chunks, shape.rows):
            slots[shard, row], positions[shard, row] = chunk.request.slot, chunk.stop - 1
            limits[shard, row] = chunk.request.max_num_cached if chunk.is_last else chunk.stop - 1
    constants, shards = table.constants(slots), np.arange(len(plan.rows))[:, None]
    return StepBatch(
        slots=slots,
        positions=positions,
        num_remaining=limits - positions,
        stop_token_ids=constants.stop_token_ids,
        block_tables=table.block_tables[shards, slots, : shape.pages],
        sampling=SamplingArrays(**constants.sampling),
        chunks=_chunk_arrays(plan.chunks, shape) if shape.chunks else None,
    )


def empty(shape: StepShape, buckets: Buckets) -> StepBatch:
    """Of nothing: what any batch of this shape has of shapes and dtypes."""
    shards = range(buckets.num_shards)
    none = [np.zeros(0, np.int32) for _ in shards]
    plan = StepPlan([[] for _ in shards], [[] for _ in shards], none, none, shape.num_steps)
    return build(plan, shape, buckets.empty_table())


def _chunk_arrays(by_shard: list[list[Chunk]], shape: StepShape) -> ChunkArrays:
    tokens = np.zeros((len(by_shard), shape.chunk_tokens), np.int32)
    starts, lengths = np.zeros((2, len(by_shard), shape.chunks), np.int32)
    for shard, chunks in enumerate(by_shard):
        end = 0
        for i, chunk in enumerate(chunks):
            start, end = end, end + chunk.num_tokens
            starts[shard, i], lengths[shard, i] = chunk.start, chunk.num_tokens
            tokens[shard, start:end] = chunk.request.token_ids[chunk.start : chunk.stop]
    return ChunkArrays(tokens, starts, lengths)
