"""Turns the wheel: plans a step, starts it, and takes in the step before while it runs.

    Scheduler.schedule -> StepPlan -> batch.build -> Runner.dispatch ... one turn later ... -> Scheduler.commit

What the next step needs of the step under way, a row's last token, stays on the devices; so these never wait for
the host to read, decide and convert.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxinfer import batch as batches
from jaxinfer import extras
from jaxinfer.batch import StepBatch, StepShape
from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.extras import Extras
from jaxinfer.logprobs import Logprobs
from jaxinfer.metrics import EngineMetrics
from jaxinfer.outputs import TokenLogprobs
from jaxinfer.request import FinishReason, Request
from jaxinfer.resolve import ResolvedEngine
from jaxinfer.runner import Runner
from jaxinfer.scheduler import Scheduler
from jaxinfer.shard import ShardSizes
from jaxinfer.stats import EngineStats
from jaxinfer.step_plan import StepPlan, StepResult
from jaxinfer.steps import Arrays, StepOutput
from sharding_rules import axes as ax


class EngineDeadError(RuntimeError):
    """The engine cannot go on; the cause says why."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """On the host."""

    plan: StepPlan
    shape: StepShape
    batch: StepBatch
    extras: Extras | None


@dataclasses.dataclass(frozen=True)
class _StepUnderWay:
    step: _Step
    output: StepOutput  # on the devices
    start_time: float


class EngineCore:
    """Requests in, their tokens out, by way of a scheduler and a runner. Knows nothing of text."""

    def __init__(self, scheduler: Scheduler, runner: Runner, stats: EngineStats):
        self.scheduler = scheduler
        self.runner = runner
        self.stats = stats
        self._prepared: _Step | None = None  # waits for its program
        self._under_way: _StepUnderWay | None = None
        self._told: list[Request] = []  # got tokens or ended, and were not returned yet
        self._last_commit_time = 0.0

    @classmethod
    def create(
        cls,
        resolved: ResolvedEngine,
        weights: Arrays,
        stats: EngineStats,
        make_runner: Callable[..., Runner] = Runner,
    ) -> "EngineCore":
        """As `resolved` has decided; it is ready once that is compiled."""
        runner = make_runner(
            resolved.definition,
            weights,
            resolved.cache_spec,
            resolved.buckets,
            backend=resolved.attention.name,
            counts_experts=resolved.config.expert_counts,
        )
        sizes = ShardSizes(
            num_shards=resolved.definition.partitioner.num_shards(ax.BATCH),
            slots_per_shard=resolved.slots_per_shard,
            pages_per_shard=resolved.memory.pages_per_shard,
            page_size=resolved.memory.page_size,
            max_model_len=resolved.max_model_len,
            context_size=resolved.memory.context_size,
        )
        scheduler = Scheduler(
            sizes,
            ChunkPolicy(resolved.config.max_num_batched_tokens, resolved.buckets.chunk_tokens),
            decode_steps=resolved.config.decode_steps,
            enable_prefix_caching=resolved.config.enable_prefix_caching,
        )
        return cls(scheduler, runner, stats)

    def start_compiling(self) -> None:
        self.runner.start_compiling()

    @property
    def is_compiling(self) -> bool:
        return self.runner.is_compiling

    def finish_compiling(self, progress: Callable[[int, int], None] | None = None) -> float:
        return self.runner.finish_compiling(progress)

    @property
    def has_work(self) -> bool:
        has_step = self._prepared is not None or self._under_way is not None
        return self.scheduler.has_work or has_step or bool(self._told)

    def abort(self, request: Request) -> None:
        """Ends a request and frees what it holds. Does nothing if it has finished."""
        if request.finish_reason is None:
            request.finish(FinishReason.ABORT)
            self.scheduler.release(request)

    def step(self) -> list[Request]:
        """Starts the next step and commits the one before: the requests of that one that got tokens or ended.

        Where the next one's program is still being compiled, it is started by the next call: what is there needs not
        wait for it.

        Raises what the devices raise; requests that were running then end with an error, and those that wait
        stay. EngineDeadError if not even that could be done.
        """
        try:
            step, before = self._prepared or self._prepare(), self._under_way
            has_to_wait = step and before and not self.runner.is_compiled(step.shape, step.extras)
            self._prepared, self._under_way = (step, None) if has_to_wait else (None, step and self._start(step))
            if before is not None:
                self._commit(before)
        except BaseException as error:
            try:
                self._recover()
            except Exception as worse:
                raise EngineDeadError(f"a step failed, and then a new cache did: {error!r}; {worse!r}") from error
            raise
        return self.take_told()

    def take_told(self) -> list[Request]:
        """What `step` would have returned if it had not raised: who got tokens or ended."""
        told, self._told = self._told, []
        return told

    def metrics(self, num_compilations_after_ready: int) -> EngineMetrics:
        scheduler, totals = self.scheduler, self.scheduler.stats
        num_free = sum(allocator.num_free for allocator in scheduler.allocators)
        return EngineMetrics(
            num_running=scheduler.num_running,
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=1 - num_free / sum(allocator.num_usable_pages for allocator in scheduler.allocators),
            num_steps=self.stats.steps,
            num_preemptions=scheduler.num_preemptions,
            num_compilations_after_ready=num_compilations_after_ready,
            prompt_tokens=totals.prompt_tokens,
            cached_prompt_tokens=totals.cached_prompt_tokens,
            generation_tokens=totals.generation_tokens,
            finished=MappingProxyType({reason.value: count for reason, count in totals.finished.items()}),
            expert_tokens=self._expert_tokens(),
            **totals.latencies,
        )

    def _expert_tokens(self) -> Mapping[int, tuple[int, ...]]:
        counts = self.stats.expert_counts
        if counts is None:
            return MappingProxyType({})
        layers = self.runner.definition.decoder_config.expert_layers
        return MappingProxyType({layer: tuple(row) for layer, row in zip(layers, counts.tolist(), strict=True)})

    def close(self) -> None:
        """Frees the device memory."""
        self._prepared = self._under_way = None
        self.runner.close()

    def _prepare(self) -> _Step | None:
        """The next step, if there is anything to do."""
        if (plan := self.scheduler.schedule()) is None:
            return None
        shape = self.runner.buckets.shape(plan)
        batch = batches.build(plan, shape, self.scheduler.table)
        return _Step(plan, shape, batch, extras.build(plan, shape, self.runner.extras_spec))

    def _start(self, step: _Step) -> _StepUnderWay:
        self.runner.check_compiled(step.shape, step.extras)  # waits, which is no part of the step's time
        start_time = time.perf_counter()
        return _StepUnderWay(step, self.runner.dispatch(step.shape, step.batch, step.extras), start_time)

    def _commit(self, under_way: _StepUnderWay) -> None:
        step, output = under_way.step, under_way.output
        jax.block_until_ready(output.tokens)
        now = time.perf_counter()
        seconds, self._last_commit_time = now - max(under_way.start_time, self._last_commit_time), now
        result = step_result(step.plan, step.shape, step.batch, output)
        self.stats.add_step(step.plan, np.asarray(output.counts), seconds)
        if output.expert_counts is not None:
            self.stats.add_expert_counts(np.asarray(output.expert_counts))
        self.scheduler.commit(step.plan, result, self._told)

    def _recover(self) -> None:
        """A step that failed took the donated cache with it."""
        self._prepared = self._under_way = None
        for request in [r for rows in self.scheduler.running for r in rows]:
            request.finish(FinishReason.ERROR)
            self.scheduler.release(request)
            self._told.append(request)
        self.scheduler.forget_cache()
        self.runner.reset_cache()


def step_result(plan: StepPlan, shape: StepShape, batch: StepBatch, output: StepOutput) -> StepResult:
    """Of a step's batch, on the host, and its output, there or on the devices."""
    tokens, counts, finite = (np.asarray(x) for x in output[:3])
    is_short = counts < shape.num_steps
    may_end = is_short | (counts == batch.num_remaining)
    stops = np.flatnonzero(tokens[..., -1:] == batch.stop_token_ids)  # a few at most, where `any` takes all rows' time
    may_end.reshape(-1)[stops // batch.stop_token_ids.shape[-1]] = True
    logprobs, num_rows = _by_token(output.logprobs), [*map(len, plan.rows)]
    row_tokens = [of_shard[:n].tolist() for of_shard, n in zip(tokens, num_rows, strict=True)]
    for shard, n in enumerate(num_rows):
        for row in np.flatnonzero(is_short[shard, :n]).tolist():
            del row_tokens[shard][row][counts[shard, row] :]

    def of_chunks(by_row: Any) -> list[Any]:
        start = shape.rows
        return [of_shard[start : start + len(chunks)] for of_shard, chunks in zip(by_row, plan.chunks, strict=True)]

    def of_rows(by_row: Any) -> list[Any]:
        return [of_shard[:n] for of_shard, n in zip(by_row, num_rows, strict=True)]

    return StepResult(
        chunk_tokens=[x[:, 0].tolist() for x in of_chunks(tokens)],
        chunk_is_finite=[x.tolist() for x in of_chunks(finite)],
        row_tokens=row_tokens,
        row_is_finite=[x.tolist() for x in of_rows(finite)],
        row_may_end=[x.tolist() for x in of_rows(may_end)],
        row_logprobs=logprobs and of_rows(logprobs),
        chunk_logprobs=logprobs and of_chunks(logprobs),
        prompt_logprobs=_by_token(output.prompt_logprobs),
    )


def _by_token(logprobs: Logprobs | None) -> list[list[TokenLogprobs]] | None:
    """Of arrays [D, R, ...], by shard and row."""
    if logprobs is None:
        return None
    by_shard = zip(*(np.asarray(array).tolist() for array in logprobs), strict=True)
    return [[TokenLogprobs(*row) for row in zip(*columns, strict=True)] for columns in by_shard]
