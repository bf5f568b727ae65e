"""What a step shall do, and what became of it. Host only: requests, ints, no arrays."""

import dataclasses
from collections.abc import Iterator, Sequence

from jaxinfer.outputs import TokenLogprobs
from jaxinfer.request import Request


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece to prefill: tokens [start, stop) of `request`."""

    request: Request
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == self.request.num_prefill_tokens


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One dispatch. With a chunk in it, or a row for the full sampler, there is one decode step.

    Attributes:
      chunks: at most one for each data shard.
      rows: the requests that decode, by shard.
      starts: of each row, the position of its next token.
      num_steps: tokens that each row generates.
      has_extras: whether one of them needs the full sampler, or the log-probabilities of its prompt.
    """

    chunks: list[Chunk | None]
    rows: list[list[Request]]
    starts: list[list[int]]
    num_steps: int
    has_extras: bool = False


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What became of a StepPlan, in its order.

    Attributes:
      chunk_tokens: the token after each chunk; means something for a last chunk.
      chunk_is_finite: whether the logits were.
      row_tokens: the tokens of each row, by shard; fewer than num_steps where the row ended.
      row_is_finite: whether all logits of the row were.
      logprobs: by shard, of the only token of each row and, last, of the chunk; None if nobody wants them.
      prompt_logprobs: by shard, of the tokens that follow those of the chunk; None if nobody wants them.
    """

    chunk_tokens: Sequence[int]
    chunk_is_finite: Sequence[bool]
    row_tokens: Sequence[Sequence[Sequence[int]]]
    row_is_finite: Sequence[Sequence[bool]]
    logprobs: Sequence[Sequence[TokenLogprobs]] | None = None
    prompt_logprobs: Sequence[Sequence[TokenLogprobs]] | None = None


def outcomes(
    plan: StepPlan, result: StepResult
) -> Iterator[tuple[Request, int, Sequence[int], bool, TokenLogprobs | None]]:
    """Of each request in the step: tokens in the cache after it, tokens generated, whether logits were finite, and
    log-probabilities."""
    for shard, (chunk, token, is_finite) in enumerate(
        zip(plan.chunks, result.chunk_tokens, result.chunk_is_finite, strict=True)
    ):
        if chunk is not None:
            tokens = [token] if chunk.is_last and is_finite else []
            yield chunk.request, chunk.stop, tokens, is_finite, result.logprobs[shard][-1] if result.logprobs else None
    for shard, requests in enumerate(plan.rows):
        logprobs = result.logprobs[shard][: len(requests)] if result.logprobs else [None] * len(requests)
        for request, start, tokens, is_finite, of_token in zip(
            requests, plan.starts[shard], result.row_tokens[shard], result.row_is_finite[shard], logprobs, strict=True
        ):
            yield request, start + len(tokens), tokens, is_finite, of_token
