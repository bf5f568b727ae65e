"""A request on its way through the engine. Host only."""

import dataclasses
import enum
import time
from collections.abc import Sequence
from typing import NamedTuple

from jaxinfer.output_text import OutputText
from jaxinfer.outputs import CompletionOutput, Delta, LogprobsRecord, RequestMetrics, RequestOutput, TokenLogprobs
from jaxinfer.page_allocator import extend_digests
from jaxinfer.sampling_params import SamplingParams

# Per request; widths of tables on the devices.
MAX_STOP_TOKEN_IDS = 16  # the model's end tokens included
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 8


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"
    ERROR = "error"  # the model produced a value that is not finite, its step failed, or its text did


class Reached(NamedTuple):
    """How far an output has come."""

    num_tokens: int = 0
    text: str = ""
    finish_reason: FinishReason | None = None


@dataclasses.dataclass(eq=False, kw_only=True, slots=True)  # slots: more fields than a shared dict of names has
class Request:
    """One sequence on its way: waiting -> prefilling -> decoding -> finished; preemption goes back to waiting.

    What the devices will have done and what the host knows of it are a step apart: `num_prefilled` counts the step
    that is under way, as `SlotTable.positions` does; `token_ids` does not.

    Attributes:
      number: of its arrival; unique in the engine.
      prompt: as given, if it was text.
      params: as given.
      stop_token_ids: the model's end tokens and the request's own.
      max_tokens: `params.max_tokens`, cut to what max_model_len leaves.
      seed: of its draws.
      text: of the output, as far as it was read: `output_text` reads on.
      num_read: tokens of the output that `text` has.
      index: among the outputs of its prompt, whose numbers follow each other.
      bad_words: `params.bad_words` as token ids.
      logprobs: of the output, if asked for.
      prompt_logprobs: of the prompt from its second token on, if asked for.
      priority: lower runs first.
      cache_salt: requests with different salts share no cached pages.
      token_ids: prompt, never empty, and output; the end token, if there was one, is the last.
      num_prompt_tokens: how many of them are the prompt.
      num_prefill_tokens: how many are prefilled; the prompt, and after a preemption the output so far as well.
      num_prefilled: how many of these are in the cache when the steps under way are done.
      last_step: what it may still be part of, by the number of the step, when it is preempted.
      page_digests: what its full pages hold, as far as it has been computed.
      num_published: how many of its pages the allocator knows the content of.
      shard, slot: the data shard that runs it, and its place there; slot is -1 while none does.
      max_num_tokens: prompt and output at most.
      max_num_cached: tokens in the cache at most: the last one is never read.
      needs_full_sampler: `params.needs_full_sampler`, worked out once.
      watches_tokens: whether each of its tokens does more than to follow the others.
    """

    number: int
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    text: OutputText
    index: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: LogprobsRecord | None = None
    prompt_logprobs: LogprobsRecord | None = None
    priority: int = 0
    cache_salt: bytes = b""
    num_prompt_tokens: int = 0
    num_prefill_tokens: int = 0
    num_prefilled: int = 0
    last_step: int = 0
    num_preemptions: int = 0
    page_digests: list[bytes] = dataclasses.field(default_factory=list)
    num_published: int = 0
    shard: int = 0
    slot: int = -1
    num_read: int = 0
    finish_reason: FinishReason | None = None
    arrival_time: float = dataclasses.field(default_factory=time.perf_counter)
    start_time: float | None = None  # of its first prefill
    first_token_time: float | None = None
    finish_time: float | None = None
    max_num_tokens: int = dataclasses.field(init=False)
    max_num_cached: int = dataclasses.field(init=False)
    needs_full_sampler: bool = dataclasses.field(init=False)
    watches_tokens: bool = dataclasses.field(init=False)

    def __post_init__(self):
        self.num_prompt_tokens = self.num_prefill_tokens = len(self.token_ids)
        self.max_num_tokens = self.num_prompt_tokens + self.max_tokens
        self.max_num_cached = self.max_num_tokens - 1
        self.needs_full_sampler = self.params.needs_full_sampler
        self.watches_tokens = self.logprobs is not None or bool(self.params.stop)

    @property
    def request_id(self) -> str:
        """The same for all outputs of a prompt."""
        return str(self.number - self.index)

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
    def is_running(self) -> bool:
        return self.slot >= 0

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled >= self.num_prefill_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some of them are still to come: then the prompt must run, cached or not."""
        return self.prompt_logprobs is not None and 1 + len(self.prompt_logprobs.entries) < self.num_prompt_tokens

    def extend_digests(self, page_size: int) -> None:
        """Computes what is missing of `page_digests`."""
        extend_digests(self.page_digests, self.token_ids, page_size, self.cache_salt)

    @property
    def output_text(self) -> str:
        """So far; what may still change is held back."""
        if self.finish_reason is None and self._read_text(len(self.token_ids)):
            self.watches_tokens = True  # it failed, and ends with the next token
        return self.text.text

    def shareable_digests(self, page_size: int) -> list[bytes]:
        """Of the pages that need not run: those before the one with the last token, which must, to give the next."""
        if self.wants_prompt_logprobs:
            return []
        return self.page_digests[: (len(self.token_ids) - 1) // page_size]

    def append(self, token_ids: Sequence[int], logprobs: TokenLogprobs | None = None) -> int:
        """Takes generated tokens in, up to the one that ends the request, and says how many.

        There is at least one; `logprobs` are of an only one.
        """
        if self.first_token_time is None:
            self.first_token_time = time.perf_counter()
        if logprobs is not None and self.logprobs is not None:
            self.logprobs.add(token_ids[0], logprobs)
        for count, token_id in enumerate(token_ids, start=1):
            self.token_ids.append(token_id)
            if token_id in self.stop_token_ids:
                self.finish(FinishReason.STOP, num_hidden=not self.params.include_stop_str_in_output)
            elif self.text.error is not None or (self.params.stop and self._read_text(len(self.token_ids))):
                self.finish(FinishReason.STOP)
            elif len(self.token_ids) == self.max_num_tokens:
                self.finish(FinishReason.LENGTH)
            if self.finish_reason is not None:
                return count
        return len(token_ids)

    def add_prompt_logprobs(self, start: int, logprobs: Sequence[TokenLogprobs]) -> None:
        """Of the tokens that follow those of a chunk from `start` on; what is known already, or no prompt, is left."""
        record = self.prompt_logprobs
        assert record is not None
        for position, computed in enumerate(logprobs, start + 1):
            if position == 1 + len(record.entries) < self.num_prompt_tokens:
                record.add(self.token_ids[position], computed)

    def finish(self, reason: FinishReason, num_hidden: int = 0) -> None:
        """Ends the request; the first reason stays. The last `num_hidden` tokens are not part of the text."""
        if self.finish_reason is None:
            self._read_text(len(self.token_ids) - num_hidden)
            self.text.finish()
            self.finish_reason = reason if self.text.error is None else FinishReason.ERROR
            self.finish_time = time.perf_counter()

    def _read_text(self, stop: int) -> bool:
        """Gives `text` the tokens before `stop` that it lacks; True once a stop string was reached.

        Not as they come, unless a stop string may end them: many at once take a fraction of the time.
        """
        tokens = self.token_ids[self.num_prompt_tokens + self.num_read : stop]
        self.num_read += len(tokens)
        return bool(tokens) and self.text.add(tokens)

    @property
    def reached(self) -> Reached:
        """How far it has come."""
        return Reached(len(self.token_ids) - self.num_prompt_tokens, self.output_text, self.finish_reason)

    def delta(self, before: Reached, now: Reached) -> Delta:
        """What came between two of `reached`. The lists that it reads only grow, so another thread may read them."""
        start = self.num_prompt_tokens
        return Delta(
            text=now.text[len(before.text) :],
            token_ids=self.token_ids[start + before.num_tokens : start + now.num_tokens],
            finish_reason=now.finish_reason and now.finish_reason.value,
            index=self.index,
            logprobs=self.logprobs and self.logprobs.entries[before.num_tokens : now.num_tokens],
        )

    def completion(self) -> CompletionOutput:
        """What there is so far."""
        logprobs = self.logprobs
        return CompletionOutput(
            index=self.index,
            text=self.output_text,
            token_ids=self.output_token_ids,
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
            logprobs=None if logprobs is None else [*logprobs.entries],
            cumulative_logprob=None if logprobs is None else logprobs.total,
        )

    @property
    def metrics(self) -> RequestMetrics:
        """The times that are known by now."""
        queue_s, ttft_s, e2e_s = (
            None if when is None else when - self.arrival_time
            for when in (self.start_time, self.first_token_time, self.finish_time)
        )
        num_later_tokens, tpot_s = len(self.token_ids) - self.num_prompt_tokens - 1, None
        if ttft_s is not None and e2e_s is not None and num_later_tokens:
            tpot_s = (e2e_s - ttft_s) / num_later_tokens
        return RequestMetrics(queue_s=queue_s, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s)


def output_of(requests: Sequence[Request]) -> RequestOutput:
    """What there is so far of a prompt's outputs, in the order of their index."""
    first = requests[0]
    return RequestOutput(
        request_id=first.request_id,
        prompt=first.prompt,
        prompt_token_ids=first.prompt_token_ids,
        outputs=[request.completion() for request in requests],
        metrics=RequestMetrics.of_all([request.metrics for request in requests]),
        prompt_logprobs=None if first.prompt_logprobs is None else [None, *first.prompt_logprobs.entries],
    )
