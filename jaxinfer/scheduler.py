"""Chooses what runs next. Host only.

    waiting -> prefilling, piece by piece -> decoding -> finished
       ^------------- preempted ---------------'

A step decodes every running sequence and, beside them, prefills prompts or pieces of them, within a budget of
tokens per data shard. Requests run in order of priority, then of arrival. Pages are taken as sequences grow; when none
is free, the last in order is preempted: it gives up its pages and later starts over from prompt and output, of
which the prefix cache still has what was not evicted. The first in order is never preempted, so there is always
progress. With `data` in the mesh each shard has its own slots and pages, and a request goes to the least loaded.

Steps are planned one ahead of their results: `schedule` counts on what the step under way will have done, and
`commit` takes its tokens in. A sequence that turns out to have ended takes part in one step more, in which the
devices do nothing for it.
"""

import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain

import numpy as np

from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.integers import cdiv
from jaxinfer.outputs import TokenLogprobs
from jaxinfer.page_allocator import PageAllocator
from jaxinfer.request import FinishReason, Request
from jaxinfer.request_stats import RequestStats
from jaxinfer.shard import Shard, ShardSizes
from jaxinfer.slot_table import SlotTable
from jaxinfer.step_plan import StepPlan, StepResult, chunk_outcomes, prompt_logprobs


class Scheduler:
    """Waiting and running requests, and who holds which slots and pages.

    `decode_steps` is how many tokens a row generates in a step when nobody waits.

    Attributes:
      table: what steps are built from.
      shards: who runs where.
      waiting: in order.
    """

    def __init__(
        self, sizes: ShardSizes, chunk_policy: ChunkPolicy, *, decode_steps: int, enable_prefix_caching: bool = True
    ):
        self.page_size = page_size = sizes.page_size
        self.chunk_policy = chunk_policy
        self.decode_steps = decode_steps
        self.enable_prefix_caching = enable_prefix_caching
        self.table = SlotTable(sizes.num_shards, sizes.slots_per_shard, cdiv(sizes.max_model_len, page_size))
        allocators = [PageAllocator(sizes.pages_per_shard, sizes.context_size) for _ in range(sizes.num_shards)]
        self.shards = [Shard(i, allocator, page_size, self.table) for i, allocator in enumerate(allocators)]
        self.waiting: list[Request] = []
        self.num_preemptions = 0
        self.stats = RequestStats()
        self._is_alone = sizes.num_shards * sizes.slots_per_shard == 1  # nobody can join who runs
        self._num_full = 0  # of those that run, who need the full sampler
        self._num_planned = self._num_committed = 0  # steps

    @property
    def running(self) -> list[list[Request]]:
        """By shard, each in order."""
        return [shard.running for shard in self.shards]

    @property
    def allocators(self) -> list[PageAllocator]:
        return [shard.allocator for shard in self.shards]

    @property
    def num_running(self) -> int:
        return sum(map(len, self.running))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    def check_fits(self, request: Request) -> None:
        """Raises ValueError for a request that not even an empty shard could hold."""
        needed, usable = cdiv(request.max_num_cached, self.page_size), self.allocators[0].num_usable_pages
        if needed > usable:
            raise ValueError(
                f"prompt of {request.num_prompt_tokens} tokens plus max_tokens {request.max_tokens} needs {needed} "
                f"cache pages and the pool has {usable}; raise --kv_cache_bytes or lower max_tokens"
            )

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError for one that can never fit."""
        self.check_fits(request)
        insort(self.waiting, request, key=lambda r: r.order)

    def schedule(self) -> StepPlan | None:
        """The next step; None if there is nothing to do before the step under way is committed."""
        for shard in self.shards:
            self._grow(shard)
        self._admit()
        slots = [shard.decoding() for shard in self.shards]
        chunks = [self.chunk_policy.chunks(x.prefilling, len(rows)) for x, rows in zip(self.shards, slots, strict=True)]
        if not any(chunks) and not any(map(len, slots)):
            return None
        wants_one = self.decode_steps == 1 or (self.waiting and not self._is_alone) or any(chunks) or self._num_full > 0
        num_steps = 1 if wants_one else self._grow_for_more_steps(slots)
        has_extras = self._num_full > 0 or any(c.request.wants_prompt_logprobs for c in chain.from_iterable(chunks))
        by_shard = [*zip(self.shards, slots, strict=True)]
        rows = [shard.requests(of_shard) for shard, of_shard in by_shard]
        starts = [shard.decode(of_shard, num_steps) for shard, of_shard in by_shard]
        for chunk in chain.from_iterable(chunks):
            self.shards[chunk.request.shard].prefill(chunk.request, chunk.stop)
        self._num_planned += 1
        return StepPlan(chunks, rows, slots, starts, num_steps, has_extras)

    def commit(self, plan: StepPlan, result: StepResult, touched: list[Request]) -> None:
        """Takes in what a step did, and lets go of what ended.

        Adds to `touched` who got tokens or ended: the first of them also if the text of another raises.
        """
        self._num_committed += 1
        for chunk, logprobs in prompt_logprobs(plan, result):
            chunk.request.add_prompt_logprobs(chunk.start, logprobs)
        for chunk, tokens, is_finite, logprobs in chunk_outcomes(plan, result):
            self._take(chunk.request, tokens, is_finite, logprobs, touched)
            if chunk.request.finish_reason is None:
                self._publish(chunk.request, chunk.stop)
        for shard, requests in enumerate(plan.rows):
            self._commit_rows(shard, requests, result, touched)

    def release(self, request: Request) -> None:
        """Takes a finished request out, counts it, and frees what it holds. Once per request."""
        self.stats.add_finished(request)
        if request.is_running:
            self._stop(request)
        else:
            del self.waiting[bisect_left(self.waiting, request.order, key=lambda r: r.order)]

    def forget_cache(self) -> None:
        """The devices lost their caches, and with them the steps under way. Nothing may be running."""
        assert not self.num_running, "running requests rely on the cache"
        self._num_committed = self._num_planned
        for allocator in self.allocators:
            allocator.forget()

    def check(self) -> None:
        """Raises AssertionError unless pages, slots and requests agree."""
        for shard in self.shards:
            shard.check()
        assert self._num_full == sum(r.needs_full_sampler for rows in self.running for r in rows)
        assert self.waiting == sorted(self.waiting, key=lambda r: r.order)
        assert not any(request.is_running for request in self.waiting)

    def _grow(self, shard: Shard) -> None:
        """Gives each row a page for its next token, preempting the last in order where there is none."""
        slots = shard.starved()
        if len(slots) <= shard.allocator.num_free:
            shard.give_page(slots)
            return
        for request in sorted(shard.requests(slots), key=lambda r: r.order):
            while request.is_running and not shard.allocator.num_free:
                self._preempt(shard.running[-1])
            if request.is_running:  # it was not preempted itself
                shard.give_page(np.array([request.slot]))

    def _grow_for_more_steps(self, slots: list[np.ndarray]) -> int:
        """Gives each row pages for `decode_steps` tokens, and returns that; where it takes a preemption, 1."""
        by_shard = [*zip(self.shards, slots, strict=True)]
        missing = [shard.num_missing_pages(of_shard, self.decode_steps) for shard, of_shard in by_shard]
        if any(counts.sum() > a.num_free for counts, a in zip(missing, self.allocators, strict=True)):
            return 1
        for (shard, of_shard), counts in zip(by_shard, missing, strict=True):
            for count in range(counts.max(initial=0)):
                shard.give_page(of_shard[counts > count])
        return self.decode_steps

    def _preempt(self, request: Request) -> None:
        self._stop(request)
        request.last_step = self._num_planned
        request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, request, key=lambda r: r.order)

    def _stop(self, request: Request) -> None:
        has_output = len(request.token_ids) > request.num_prefill_tokens
        if has_output and request.finish_reason is not FinishReason.ERROR:
            self._publish(request, len(request.token_ids) - 1)  # the last token is not in the cache, or not for sure
        self.shards[request.shard].stop(request)
        self._num_full -= request.needs_full_sampler

    def _admit(self) -> None:
        """Starts waiting requests, in order, while there is room for them, and in the step for their prompts."""
        while self.waiting:
            request = self.waiting[0]
            if request.last_step > self._num_committed:  # tokens may be under way, which belong to what is prefilled
                return
            if self.enable_prefix_caching:
                request.extend_digests(self.page_size)
            shards = [shard for shard in self.shards if self._has_room(shard, request)]
            if not shards:
                return
            self._start(self.waiting.pop(0), min(shards, key=lambda shard: len(shard.running)))

    def _has_room(self, shard: Shard, request: Request) -> bool:
        if not shard.has_free_slot or not self.chunk_policy.has_room(shard.prefilling, len(shard.decoding())):
            return False
        return shard.can_start(request)

    def _start(self, request: Request, shard: Shard) -> None:
        shard.start(request)
        self._num_full += request.needs_full_sampler
        if request.start_time is None:  # and is not back after a preemption, with what it had cached itself
            request.start_time = time.perf_counter()
            self.stats.add_started(request)

    def _commit_rows(self, shard: int, requests: list[Request], result: StepResult, touched: list[Request]) -> None:
        rows, num_tokens = zip(requests, result.row_tokens[shard], result.row_may_end[shard], strict=True), 0
        for row, (request, tokens, may_end) in enumerate(rows):
            if request.finish_reason is not None:
                continue  # it was aborted, or ended in the step before
            if may_end or request.watches_tokens:
                of_token = result.row_logprobs[shard][row] if result.row_logprobs else None
                self._take(request, tokens, result.row_is_finite[shard][row], of_token, touched)
            else:  # nearly all: what takes time here, it takes for every token of every sequence
                request.token_ids += tokens
                num_tokens += len(tokens)
                touched.append(request)
        self.stats.generation_tokens += num_tokens

    def _take(
        self,
        request: Request,
        tokens: Sequence[int],
        is_finite: bool,
        logprobs: TokenLogprobs | None,
        touched: list[Request],
    ) -> None:
        """What a step did for a request: the tokens that it generated."""
        if request.finish_reason is not None:
            return
        if tokens:
            self.stats.generation_tokens += request.append(tokens, logprobs)
        if not is_finite:
            request.finish(FinishReason.ERROR)
        if request.finish_reason is not None:
            self.release(request)
        if tokens or not is_finite:
            touched.append(request)

    def _publish(self, request: Request, num_tokens: int) -> None:
        """Lets others share the full pages of its first tokens, unless it was stopped meanwhile.

        Those of the prompt as they fill; those of the output when it stops, for many at once cost less.
        """
        if self.enable_prefix_caching and request.is_running and num_tokens // self.page_size > request.num_published:
            self.shards[request.shard].publish(request, num_tokens)
