"""What a step shall do, and what became of it. Host only."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxinfer.outputs import TokenLogprobs
from jaxinfer.request import Request

MAX_CHUNKS = 8  # of a data shard in a step


def num_chunks(num_slots: int) -> int:
    """How many chunks a step is compiled for, of a data shard with so many slots."""
    return min(MAX_CHUNKS, num_slots)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece to prefill: tokens [start, stop) of `request`."""

    request: Request
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == self.request.num_prefill_tokens

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One dispatch. With chunks in it, or a row for the full sampler, there is one decode step.

    Attributes:
      chunks: at most MAX_CHUNKS for each data shard, of different prompts.
      rows: the requests that decode, by shard.
      slots, starts: of each row, its slot, and the position of its next token; ints [len(rows)], by shard.
      num_steps: tokens that each row generates.
      has_extras: whether one of them needs the full sampler, or the log-probabilities of its prompt.
    """

    chunks: list[list[Chunk]]
    rows: list[list[Request]]
    slots: list[np.ndarray]
    starts: list[np.ndarray]
    num_steps: int
    has_extras: bool = False


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What became of a StepPlan, in its order.

    Attributes:
      chunk_tokens: the token after each chunk, by shard; means something for a last chunk.
      chunk_is_finite: whether its logits were.
      row_tokens: the tokens of each row, by shard; fewer than num_steps where the row ended.
      row_is_finite: whether all logits of the row were.
      row_may_end: whether the row may have come to its end; where it has not, it has num_steps tokens, and all finite.
      row_logprobs, chunk_logprobs: of the only token of each, by shard; None if nobody wants them.
      prompt_logprobs: by shard, of the tokens that follow those of the chunks, chunk after chunk; None likewise.
    """

    chunk_tokens: Sequence[Sequence[int]]
    chunk_is_finite: Sequence[Sequence[bool]]
    row_tokens: Sequence[Sequence[Sequence[int]]]
    row_is_finite: Sequence[Sequence[bool]]
    row_may_end: Sequence[Sequence[bool]]
    row_logprobs: Sequence[Sequence[TokenLogprobs]] | None = None
    chunk_logprobs: Sequence[Sequence[TokenLogprobs]] | None = None
    prompt_logprobs: Sequence[Sequence[TokenLogprobs]] | None = None


def chunk_outcomes(
    plan: StepPlan, result: StepResult
) -> Iterator[tuple[Chunk, Sequence[int], bool, TokenLogprobs | None]]:
    """Of each chunk: the tokens that were generated after it, whether its logits were finite, and log-probabilities."""
    for shard, chunks in enumerate(plan.chunks):
        logprobs = result.chunk_logprobs[shard] if result.chunk_logprobs else [None] * len(chunks)
        for chunk, token, is_finite, of_token in zip(
            chunks, result.chunk_tokens[shard], result.chunk_is_finite[shard], logprobs, strict=True
        ):
            yield chunk, [token] if chunk.is_last and is_finite else [], is_finite, of_token


def prompt_logprobs(plan: StepPlan, result: StepResult) -> Iterator[tuple[Chunk, Sequence[TokenLogprobs]]]:
    """Of each chunk of whose prompt they are wanted and whose logits were finite."""
    if result.prompt_logprobs is None:
        return
    for chunks, are_finite, logprobs in zip(plan.chunks, result.chunk_is_finite, result.prompt_logprobs, strict=True):
        end = 0
        for chunk, is_finite in zip(chunks, are_finite, strict=True):
            start, end = end, end + chunk.num_tokens
            if is_finite and chunk.request.wants_prompt_logprobs:
                yield chunk, logprobs[start:end]
