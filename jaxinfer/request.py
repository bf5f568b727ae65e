"""What goes into the engine and what comes out. Host only."""

import array
import dataclasses
import enum
import math
import time
from collections.abc import Sequence
from typing import cast

from jaxinfer.output_text import OutputText
from jaxinfer.unknown_names import StrictFields

MAX_STOP_TOKEN_IDS = 16  # per request, the model's end tokens included: the width of the device's stop table


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams(StrictFields):
    """How to choose tokens, and when to stop. Names and defaults are vLLM's.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: draw among the k likeliest tokens; 0 or -1 for all.
      top_p: draw among the likeliest tokens whose probabilities reach top_p; 1 for all.
      min_p: draw among the tokens at least min_p times as likely as the likeliest; 0 for all.
      seed: of this request's draws, in [0, 2**32); None for one derived from the engine's seed.
      max_tokens: most tokens to generate.
      stop: strings that end the output; they are not part of it.
      stop_token_ids: token ids that end the output besides the model's own end tokens.
      ignore_eos: go on past the model's end tokens.
      skip_special_tokens: leave special tokens out of the text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._check_number("temperature", 0, 1e4)
        self._check_number("top_p", 0, 1)
        if self.top_p == 0:
            raise ValueError("top_p=0: must be above 0 (temperature=0 is greedy)")
        self._check_number("min_p", 0, 1)
        self._check_integer("top_k", -1, 2**31 - 1)
        self._check_integer("max_tokens", 1, 2**31 - 1)
        if self.seed is not None:
            self._check_integer("seed", 0, 2**32 - 1)
        if not all(isinstance(s, str) and s for s in self.stop_strings):
            raise ValueError(f"stop={self.stop!r}: expected non-empty strings")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return cast(tuple[str, ...], self.stop)  # which the constructor made one

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{name}={value!r}: must be a number in [{low}, {high:g}]")

    def _check_integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name}={value!r}: must be an integer in [{low}, {high}]")


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"
    ERROR = "error"  # the model produced a value that is not finite, or its step failed


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """One sequence on its way: waiting -> prefilling -> decoding -> finished; preemption goes back to waiting.

    What the devices will have done and what the host knows of it are a step apart: `num_cached` counts the step
    that is under way, `token_ids` does not.

    Attributes:
      number: of its arrival; unique in the engine.
      prompt: as given, if it was text.
      params: as given.
      stop_token_ids: the model's end tokens and the request's own.
      max_tokens: `params.max_tokens`, cut to what max_model_len leaves.
      seed: of its draws.
      text: of the output so far.
      priority: lower runs first.
      cache_salt: requests with different salts share no cached pages.
      token_ids: prompt, never empty, and output; the end token, if there was one, is the last.
      num_prompt_tokens: how many of them are the prompt.
      num_prefill_tokens: how many are prefilled; the prompt, and after a preemption the output so far as well.
      num_cached: tokens whose keys and values are in the cache when the steps under way are done.
      num_in_flight: steps under way that it takes part in.
      page_ids: its pages, in order of position; local to `shard`. An array, because every step copies it.
      page_digests: what its full pages hold, as far as it has been computed.
      num_published: how many of its pages the allocator knows the content of.
      shard, slot: the data shard that runs it, and its place there.
      max_num_tokens: prompt and output at most.
      max_num_cached: tokens in the cache at most: the last one is never read.
      constants: what `batch` makes of what never changes.
    """

    number: int
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    text: OutputText
    priority: int = 0
    cache_salt: bytes = b""
    num_prompt_tokens: int = 0
    num_prefill_tokens: int = 0
    num_cached: int = 0
    num_in_flight: int = 0
    num_preemptions: int = 0
    page_ids: "array.array[int]" = dataclasses.field(default_factory=lambda: array.array("i"))
    page_digests: list[bytes] = dataclasses.field(default_factory=list)
    num_published: int = 0
    shard: int = 0
    slot: int = 0
    finish_reason: FinishReason | None = None
    arrival_time: float = dataclasses.field(default_factory=time.perf_counter)
    start_time: float | None = None  # of its first prefill
    first_token_time: float | None = None
    finish_time: float | None = None
    constants: bytes = b""

    def __post_init__(self):
        self.num_prompt_tokens = self.num_prefill_tokens = len(self.token_ids)
        self.max_num_tokens = self.num_prompt_tokens + self.max_tokens
        self.max_num_cached = self.max_num_tokens - 1

    @property
    def request_id(self) -> str:
        return str(self.number)

    @property
    def order(self) -> tuple[int, int]:
        """Who runs first, and who is preempted last."""
        return self.priority, self.number

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_prefilled(self) -> bool:
        return self.num_cached >= self.num_prefill_tokens

    @property
    def can_decode(self) -> bool:
        """Whether it generates another token after the steps under way, unless one of those ends it."""
        return self.num_prefill_tokens <= self.num_cached < self.max_num_cached

    def append(self, token_ids: Sequence[int]) -> None:
        """Takes generated tokens in, up to the one that ends the request."""
        if token_ids and self.first_token_time is None:
            self.first_token_time = time.perf_counter()
        for token_id in token_ids:
            self.token_ids.append(token_id)
            # A stop token ends the text before itself.
            if token_id in self.stop_token_ids or self.text.add([token_id]):
                self.finish(FinishReason.STOP)
            elif len(self.token_ids) == self.max_num_tokens:
                self.finish(FinishReason.LENGTH)
            if self.finish_reason is not None:
                return

    def finish(self, reason: FinishReason) -> None:
        """Ends the request; the first reason stays."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.finish_time = time.perf_counter()
            self.text.finish()

    def output(self) -> "RequestOutput":
        """What there is so far."""
        completion = CompletionOutput(
            index=0,
            text=self.text.text,
            token_ids=self.output_token_ids,
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion],
            metrics=self.metrics,
        )

    @property
    def metrics(self) -> "RequestMetrics":
        """The times that are known by now."""
        queue_s, ttft_s, e2e_s = (
            None if when is None else when - self.arrival_time
            for when in (self.start_time, self.first_token_time, self.finish_time)
        )
        num_later_tokens, tpot_s = len(self.token_ids) - self.num_prompt_tokens - 1, None
        if ttft_s is not None and e2e_s is not None and num_later_tokens:
            tpot_s = (e2e_s - ttft_s) / num_later_tokens
        return RequestMetrics(queue_s=queue_s, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s)


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


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One generated text. `finish_reason` is None while it is still growing."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: None = None


@dataclasses.dataclass(frozen=True)
class Delta:
    """What `Engine.stream` yields: text and tokens since the last one. The last has the finish reason."""

    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A request's prompt and what came of it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)
