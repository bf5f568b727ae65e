"""The arrays of one step: host lists to NumPy, padded to a compiled shape.

Three batch types, one owner each: `scheduler` makes a StepPlan (requests and ints), this module makes the
arrays, `runner` moves them to the devices. Rows are grouped by data shard: with two shards and a bucket of
four rows per shard, rows 0-3 belong to shard 0 and rows 4-7 to shard 1. Padding rows are inactive, and their
block tables point at page 0, the scratch page.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.request import MAX_STOP_TOKEN_IDS, Request
from jaxinfer.sampling import SamplingArrays
from jaxinfer.scheduler import DecodePlan, PrefillPlan

Array = Any  # NumPy as built here, traced inside a program, abstract while it is compiled


class PrefillBatch(NamedTuple):
    """One chunk of a prompt per data shard: B rows, T tokens, M pages."""

    tokens: Array  # int32 [B, T]
    start: Array  # int32 [B]; position of the first token
    length: Array  # int32 [B]; tokens that count; 0 for a padding row
    block_tables: Array  # int32 [B, M]
    sampling: SamplingArrays


class DecodeBatch(NamedTuple):
    """The last token of each running sequence: B rows, M pages."""

    tokens: Array  # int32 [B]; not yet in the cache
    positions: Array  # int32 [B]; where they go
    num_remaining: Array  # int32 [B]; tokens that the row may still generate; 0 for a padding row
    stop_token_ids: Array  # int32 [B, MAX_STOP_TOKEN_IDS]; -1 where unused, which no token is
    block_tables: Array  # int32 [B, M]
    sampling: SamplingArrays


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Every shape that is compiled. One list each, ascending.

    Attributes:
      rows: decode rows per data shard.
      pages: pages per sequence that a step attends over.
      prefill_tokens: tokens of a prompt chunk; the last is the longest chunk.
      page_size: tokens per page.
    """

    rows: tuple[int, ...]
    pages: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    page_size: int

    @classmethod
    def create(cls, *, max_rows: int, max_model_len: int, max_chunk: int, page_size: int) -> "Buckets":
        """Rows and contexts (from 128 tokens) by powers of two, chunks (from 32) of four, up to each limit."""
        max_chunk = min(max_chunk, max_model_len)
        tokens = _powers(128, max_model_len, 2)
        return cls(
            rows=_powers(1, max_rows, 2),
            pages=tuple(dict.fromkeys(-(-t // page_size) for t in tokens)),
            prefill_tokens=_powers(32, max_chunk, 4),
            page_size=page_size,
        )

    def prefill_shapes(self) -> list[tuple[int, int]]:
        """(tokens, pages) of every prefill program: a chunk from the start, or a longest chunk further on."""
        shapes = {(t, self.num_pages(t)) for t in self.prefill_tokens}
        longest = self.prefill_tokens[-1]
        shapes |= {(longest, p) for p in self.pages if p >= self.num_pages(longest)}
        return sorted(shapes)

    def decode_shapes(self) -> list[tuple[int, int]]:
        """(rows per shard, pages) of every decode program."""
        return [(rows, pages) for rows in self.rows for pages in self.pages]

    def num_pages(self, num_tokens: int) -> int:
        """The smallest bucket of pages that holds `num_tokens`."""
        return _round_up(-(-num_tokens // self.page_size), self.pages)

    def num_rows(self, rows: int) -> int:
        return _round_up(rows, self.rows)

    def num_prefill_tokens(self, num_tokens: int) -> int:
        return _round_up(num_tokens, self.prefill_tokens)


def build_prefill(plan: PrefillPlan, buckets: Buckets) -> PrefillBatch:
    """One row per data shard. A chunk that is not the first of its prompt takes the longest shape."""
    chunks = [chunk for chunk in plan.chunks if chunk is not None]
    continues = any(chunk.start > 0 for chunk in chunks)
    longest = max(chunk.stop - chunk.start for chunk in chunks)
    num_tokens = buckets.prefill_tokens[-1] if continues else buckets.num_prefill_tokens(longest)
    num_pages = buckets.num_pages(max(num_tokens, *(chunk.stop for chunk in chunks)))
    rows = [chunk.request if chunk else None for chunk in plan.chunks]
    tokens = np.zeros((len(rows), num_tokens), np.int32)
    start, length = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
    for row, chunk in enumerate(plan.chunks):
        if chunk is not None:
            start[row], length[row] = chunk.start, chunk.stop - chunk.start
            tokens[row, : length[row]] = chunk.request.prompt_token_ids[chunk.start : chunk.stop]
    return PrefillBatch(tokens, start, length, _block_tables(rows, num_pages), _sampling(rows))


def build_decode(plan: DecodePlan, buckets: Buckets, num_steps: int) -> DecodeBatch:
    """All running rows, with room in the block tables for `num_steps` more tokens each."""
    rows_per_shard = buckets.num_rows(max(map(len, plan.rows)))
    rows: list[Request | None] = []
    for requests in plan.rows:
        rows += requests + [None] * (rows_per_shard - len(requests))
    last = max(min(r.num_cached + num_steps, r.max_num_tokens) for r in rows if r)
    tokens, positions, num_remaining = np.zeros((3, len(rows)), np.int32)
    stop_token_ids = np.full((len(rows), MAX_STOP_TOKEN_IDS), -1, np.int32)
    for row, request in enumerate(rows):
        if request is not None:
            tokens[row] = request.output_token_ids[-1]
            positions[row] = request.num_cached
            num_remaining[row] = request.num_remaining
            stop_token_ids[row, : len(request.stop_token_ids)] = request.stop_token_ids
    block_tables = _block_tables(rows, buckets.num_pages(last))
    return DecodeBatch(tokens, positions, num_remaining, stop_token_ids, block_tables, _sampling(rows))


def _block_tables(rows: list[Request | None], num_pages: int) -> np.ndarray:
    tables = np.zeros((len(rows), num_pages), np.int32)
    for row, request in enumerate(rows):
        if request is not None:
            pages = request.page_ids[:num_pages]
            tables[row, : len(pages)] = pages
    return tables


def _sampling(rows: list[Request | None]) -> SamplingArrays:
    params = [request.params if request else None for request in rows]
    temperature = np.array([p.temperature if p else 0.0 for p in params], np.float32)
    top_k = np.array([max(p.top_k, 0) if p else 0 for p in params], np.int32)
    top_p = np.array([p.top_p if p else 1.0 for p in params], np.float32)
    return SamplingArrays(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=np.array([request.seed if request else 0 for request in rows], np.uint32),
        # Decided here, because on a mesh with `data` asking every row would be an all-reduce per token.
        draws=np.array(np.any(temperature > 0)),
        truncates=np.array(np.any((top_k > 0) | (top_p < 1))),
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
