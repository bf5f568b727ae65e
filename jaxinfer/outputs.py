"""What comes out of the engine: texts, tokens and their log-probabilities. Host only."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple


class TokenLogprobs(NamedTuple):
    """What the devices computed for one token: `MAX_LOGPROBS` likeliest ones, or the whole of a smaller vocabulary."""

    logprob: float
    rank: int
    top_ids: Sequence[int]
    top: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Of one token at one place, by the raw logits: before temperature, penalties and bans.

    Attributes:
      logprob: natural logarithm of its probability.
      rank: 1 is the likeliest.
      decoded_token: its text; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


class LogprobsRecord:
    """Grows with the tokens.

    Attributes:
      entries: of each token, itself and the `num_top` likeliest ones by token id.
      total: sum of the tokens' own.
    """

    def __init__(self, num_top: int, decode: Callable[[Sequence[int]], str] | None):
        self.entries: list[dict[int, Logprob]] = []
        self.total = 0.0
        self._num_top = num_top
        self._decode = decode

    def add(self, token_id: int, computed: TokenLogprobs) -> None:
        """Appends a token's entry: the token first, then the likeliest ones in order."""
        entry = {token_id: self._logprob(token_id, computed.logprob, computed.rank)}
        tops = zip(computed.top_ids[: self._num_top], computed.top[: self._num_top], strict=True)
        entry |= {top_id: self._logprob(top_id, top, rank) for rank, (top_id, top) in enumerate(tops, start=1)}
        self.entries.append(entry)
        self.total += computed.logprob

    def _logprob(self, token_id: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, self._decode([token_id]) if self._decode else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Times in seconds; None for what did not come about, or not yet.

    Attributes:
      queue_s: from arrival until it was first given to the devices.
      ttft_s: from arrival to the first token.
      tpot_s: per token after the first.
      e2e_s: from arrival to the end.
    """

    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def of_all(cls, outputs: Sequence["RequestMetrics"]) -> "RequestMetrics":
        """Of the outputs of a prompt: the first one's start, the slowest one's pace, the last one's end."""

        def known(name: str) -> list[float]:
            return [value for output in outputs if (value := getattr(output, name)) is not None]

        return cls(
            queue_s=min(known("queue_s"), default=None),
            ttft_s=min(known("ttft_s"), default=None),
            tpot_s=max(known("tpot_s"), default=None),
            e2e_s=max(known("e2e_s")) if len(known("e2e_s")) == len(outputs) else None,
        )


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One generated text.

    Attributes:
      index: among the outputs of the prompt.
      text, token_ids: what was generated.
      finish_reason: None while it is still growing.
      logprobs: of each token, itself and the likeliest ones by token id; None unless asked for.
      cumulative_logprob: sum over the tokens; None unless `logprobs` were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None


@dataclasses.dataclass(frozen=True)
class Delta:
    """What `Engine.stream` yields of output `index`: text, tokens and their log-probabilities since the last one.

    The last of each output has the finish reason.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    index: int = 0
    logprobs: list[dict[int, Logprob]] | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A request's prompt and what came of it: `params.n` outputs.

    `prompt_logprobs` are as a completion's, of each token of the prompt; the first is None, for nothing predicts it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)
