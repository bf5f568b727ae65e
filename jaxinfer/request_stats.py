"""Counts what became of requests: their tokens, how they ended, how long they took. Host only."""

import dataclasses
from bisect import bisect_left

from jaxinfer.request import FinishReason, Request, RequestMetrics

# Upper bounds of buckets in seconds, from a token on a fast device to a long answer on a crowded one.
BUCKETS_S = tuple(digit * 10.0**power for power in range(-4, 3) for digit in (1, 2.5, 5))


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Seconds, counted by bucket.

    Attributes:
      counts: per bucket, the last for what is above all of `BUCKETS_S`.
      sum: of all values.
    """

    counts: tuple[int, ...] = (0,) * (len(BUCKETS_S) + 1)
    sum: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """None if there are no values."""
        return self.sum / self.count if self.count else None

    def plus(self, value: float) -> "Histogram":
        """A histogram with one value more, which belongs to the first bucket whose bound it does not exceed."""
        bucket = bisect_left(BUCKETS_S, value)
        return Histogram((*self.counts[:bucket], self.counts[bucket] + 1, *self.counts[bucket + 1 :]), self.sum + value)

    def percentile(self, percent: float) -> float | None:
        """Estimated as if values were spread evenly within a bucket; None if there are none.

        Values above all bounds count as the last bound.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent={percent}: must be in [0, 100]")
        rank, low = self.count * percent / 100, 0.0
        if not self.count:
            return None
        for count, high in zip(self.counts, BUCKETS_S, strict=False):
            if count and rank <= count:
                return low + (high - low) * rank / count
            rank, low = rank - count, high
        return low


class RequestStats:
    """Sums over all requests of an engine.

    Attributes:
      prompt_tokens: of requests that were started, each counted once however often it is preempted.
      cached_prompt_tokens: those of them whose keys and values were found in the prefix cache.
      generation_tokens: generated.
      finished: requests that ended, by reason.
      latencies: the times of requests that came to their own end, by the names of `RequestMetrics`. Those that were
        aborted or failed are left out: they would pass for fast ones.
    """

    def __init__(self):
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generation_tokens = 0
        self.finished = dict.fromkeys(FinishReason, 0)
        self.latencies = {field.name: Histogram() for field in dataclasses.fields(RequestMetrics)}

    def add_started(self, request: Request) -> None:
        """A request that is about to be prefilled for the first time, on top of `request.num_prefilled` tokens."""
        self.prompt_tokens += request.num_prompt_tokens
        self.cached_prompt_tokens += request.num_prefilled

    def add_finished(self, request: Request) -> None:
        assert request.finish_reason is not None
        self.finished[request.finish_reason] += 1
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            for name, seconds in vars(request.metrics).items():
                if seconds is not None:
                    self.latencies[name] = self.latencies[name].plus(seconds)
