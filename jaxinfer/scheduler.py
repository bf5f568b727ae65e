"""Chooses what runs next. Host only: requests, ints, no arrays.

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
from itertools import chain, islice

from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.integers import cdiv
from jaxinfer.page_allocator import PageAllocator, extend_digests
from jaxinfer.request import FinishReason, Request
from jaxinfer.request_stats import RequestStats
from jaxinfer.step_plan import MAX_CHUNKS, Chunk, StepPlan, StepResult, outcomes, prompt_logprobs


class Scheduler:
    """Waiting and running requests, and who holds which slots and pages.

    `max_num_batched_tokens` and `chunk_sizes` are those of `ChunkPolicy`. `decode_steps` is how many tokens a row
    generates in a step when nobody waits.
    """

    def __init__(
        self,
        *,
        num_shards: int,
        pages_per_shard: int,
        page_size: int,
        slots_per_shard: int,
        max_num_batched_tokens: int,
        chunk_sizes: Sequence[int] = (),
        decode_steps: int,
        enable_prefix_caching: bool = True,
    ):
        self.page_size = page_size
        self.chunk_policy = ChunkPolicy(max_num_batched_tokens, chunk_sizes)
        self.decode_steps = decode_steps
        self.enable_prefix_caching = enable_prefix_caching
        self.waiting: list[Request] = []  # in order
        self.running: list[list[Request]] = [[] for _ in range(num_shards)]  # by shard, each in order
        self.allocators = [PageAllocator(pages_per_shard) for _ in range(num_shards)]
        self.num_preemptions = 0
        self.stats = RequestStats()
        self._num_full = 0  # of those that run, who need the full sampler
        self._slots_per_shard = slots_per_shard
        self._free_slots = [[*range(slots_per_shard - 1, -1, -1)] for _ in range(num_shards)]

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
        for allocator, rows in zip(self.allocators, self.running, strict=True):
            self._grow(allocator, rows)
        self._admit()
        rows = [[r for r in rows if r.can_decode] for rows in self.running]
        chunks = [self._next_chunks(*of_shard) for of_shard in zip(self.running, map(len, rows), strict=True)]
        if not any(chunks) and not any(rows):
            return None
        others_wait = self.waiting and self._slots_per_shard * len(self.running) > 1
        wants_one = others_wait or any(chunks) or self._num_full > 0
        num_steps = 1 if wants_one or not self._grow_for_more_steps(rows) else self.decode_steps
        has_extras = self._num_full > 0 or any(c.request.wants_prompt_logprobs for c in chain.from_iterable(chunks))
        starts = [[r.num_cached for r in requests] for requests in rows]
        plan = StepPlan(chunks, rows, starts, num_steps, has_extras)
        for chunk in chain.from_iterable(chunks):
            chunk.request.num_cached = chunk.stop
            chunk.request.num_in_flight += 1
        for request in chain.from_iterable(rows):
            num_cached = request.num_cached + num_steps
            request.num_cached = num_cached if num_cached < request.max_num_cached else request.max_num_cached
            request.num_in_flight += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult, touched: list[Request]) -> None:
        """Takes in what a step did, and lets go of what ended.

        Adds to `touched` who got tokens or ended: the first of them also if the text of another raises.
        """
        for chunk, logprobs in prompt_logprobs(plan, result):
            chunk.request.add_prompt_logprobs(chunk.start, logprobs)
        for request, num_cached, tokens, is_finite, logprobs in outcomes(plan, result):
            request.num_in_flight -= 1
            if request.finish_reason is not None:
                continue  # it was aborted, or ended in the step before
            if tokens:
                self.stats.generation_tokens += request.append(tokens, logprobs)
            if not is_finite:
                request.finish(FinishReason.ERROR)
            elif num_cached // self.page_size > request.num_published and request.page_ids:
                self._publish(request, num_cached)
            if request.finish_reason is not None:
                self.release(request)
            if tokens or not is_finite:
                touched.append(request)

    def release(self, request: Request) -> None:
        """Takes a finished request out, counts it, and frees what it holds. Once per request."""
        self.stats.add_finished(request)
        if request.page_ids:
            self._stop(request)
        else:
            del self.waiting[bisect_left(self.waiting, request.order, key=lambda r: r.order)]

    def forget_cache(self) -> None:
        """The devices lost their caches, and with them the steps under way. Nothing may be running."""
        assert not self.num_running, "running requests rely on the cache"
        for request in self.waiting:
            request.num_in_flight = 0
        for allocator in self.allocators:
            allocator.forget()

    def check(self) -> None:
        """Raises AssertionError unless pages, slots and requests agree."""
        for shard, (rows, allocator) in enumerate(zip(self.running, self.allocators, strict=True)):
            allocator.check()
            assert rows == sorted(rows, key=lambda r: r.order)
            holders: dict[int, int] = {}
            for page in (page for request in rows for page in request.page_ids):
                holders[page] = holders.get(page, 0) + 1
            assert holders == allocator.num_holders, "requests and allocator disagree about who holds what"
            slots = [request.slot for request in rows] + self._free_slots[shard]
            assert sorted(slots) == [*range(self._slots_per_shard)], "a slot is lost or taken twice"
            assert all(r.shard == shard and r.finish_reason is None for r in rows)
            assert all(r.num_cached <= len(r.page_ids) * self.page_size for r in rows)
            assert sum(not r.is_prefilled for r in rows) <= MAX_CHUNKS, "more prompts than a step has chunks"
        assert self._num_full == sum(r.needs_full_sampler for rows in self.running for r in rows)
        assert self.waiting == sorted(self.waiting, key=lambda r: r.order)
        assert not any(request.page_ids for request in self.waiting)

    def _grow(self, allocator: PageAllocator, rows: list[Request]) -> None:
        """Gives each row a page for its next token, preempting the last in order where there is none."""
        page_size = self.page_size
        at_page_end = [r for r in rows if r.num_cached % page_size == 0]
        for request in [r for r in at_page_end if r.num_cached == len(r.page_ids) * page_size and r.can_decode]:
            while request.page_ids and not allocator.num_free:
                self._preempt(rows[-1])
            if request.page_ids:  # it was not preempted itself
                request.page_ids.extend(allocator.allocate(1))

    def _grow_for_more_steps(self, rows: list[list[Request]]) -> bool:
        """Gives each row pages for `decode_steps` tokens; False, and nothing done, where that takes a preemption."""
        missing = [[(r, n) for r in requests if (n := self._num_missing_pages(r))] for requests in rows]
        totals = [sum(count for _, count in of_shard) for of_shard in missing]
        if any(total > a.num_free for total, a in zip(totals, self.allocators, strict=True)):
            return False
        for of_shard, total, allocator in zip(missing, totals, self.allocators, strict=True):
            pages = iter(allocator.allocate(total))
            for request, count in of_shard:
                request.page_ids.extend(islice(pages, count))
        return True

    def _num_missing_pages(self, request: Request) -> int:
        num_tokens, num_pages = request.num_cached + self.decode_steps, len(request.page_ids)
        if num_tokens <= num_pages * self.page_size:
            return 0
        return cdiv(min(num_tokens, request.max_num_cached), self.page_size) - num_pages

    def _preempt(self, request: Request) -> None:
        self._stop(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, request, key=lambda r: r.order)

    def _stop(self, request: Request) -> None:
        self.running[request.shard].remove(request)
        self._num_full -= request.needs_full_sampler
        self._free_slots[request.shard].append(request.slot)
        self.allocators[request.shard].free(request.page_ids)
        del request.page_ids[:]
        request.num_cached = request.num_published = 0

    def _admit(self) -> None:
        """Starts waiting requests, in order, while there is room for them, and in the step for their prompts."""
        while self.waiting:
            request = self.waiting[0]
            if request.num_in_flight:  # preempted with tokens under way, which belong to what is prefilled again
                return
            if self.enable_prefix_caching:
                extend_digests(request.page_digests, request.token_ids, self.page_size, request.cache_salt)
            shards = [shard for shard in range(len(self.running)) if self._has_room(shard, request)]
            if not shards:
                return
            self._start(self.waiting.pop(0), min(shards, key=lambda s: len(self.running[s])))

    def _has_room(self, shard: int, request: Request) -> bool:
        rows, allocator = self.running[shard], self.allocators[shard]
        if not self._free_slots[shard]:
            return False
        if not self.chunk_policy.has_room([r for r in rows if not r.is_prefilled], sum(r.can_decode for r in rows)):
            return False
        digests = self._usable_digests(request)
        num_cached, num_evictable = allocator.num_cached(digests)
        if any(_will_publish(row, digests, num_cached) for row in rows):
            return False
        needed = cdiv(min(len(request.token_ids) + 1, request.max_num_cached), self.page_size) - num_cached
        # Room for the others to grow, or the new one would be preempted at once.
        return needed + len(rows) <= allocator.num_free - num_evictable

    def _usable_digests(self, request: Request) -> list[bytes]:
        """Of the pages before the one with the last token, which must run to give the next."""
        if request.wants_prompt_logprobs:
            return []
        return request.page_digests[: (len(request.token_ids) - 1) // self.page_size]

    def _start(self, request: Request, shard: int) -> None:
        allocator = self.allocators[shard]
        request.page_ids.extend(allocator.share(self._usable_digests(request)))
        request.num_cached = len(request.page_ids) * self.page_size
        if request.start_time is None:  # and is not back after a preemption, with what it had cached itself
            request.start_time = time.perf_counter()
            self.stats.add_started(request)
        request.num_published = len(request.page_ids)
        request.num_prefill_tokens = len(request.token_ids)
        num_pages = cdiv(len(request.token_ids), self.page_size)
        request.page_ids.extend(allocator.allocate(num_pages - len(request.page_ids)))
        request.shard, request.slot = shard, self._free_slots[shard].pop()
        insort(self.running[shard], request, key=lambda r: r.order)
        self._num_full += request.needs_full_sampler

    def _next_chunks(self, rows: list[Request], num_decoding: int) -> list[Chunk]:
        if len(rows) == num_decoding:
            return []
        return self.chunk_policy.chunks([r for r in rows if not r.is_prefilled], num_decoding)

    def _publish(self, request: Request, num_cached: int) -> None:
        """Lets others share the pages that are full by now."""
        num_known = min(num_cached, len(request.token_ids))  # a stop string may have cut what the devices went on with
        num_full = num_known // self.page_size
        if not self.enable_prefix_caching or num_full <= request.num_published:
            return
        extend_digests(request.page_digests, request.token_ids, self.page_size, request.cache_salt)
        allocator = self.allocators[request.shard]
        while request.num_published < num_full:
            page = request.num_published
            allocator.publish(request.page_ids[page], request.page_digests[page])
            request.num_published += 1


def _will_publish(row: Request, digests: Sequence[bytes], num_known: int) -> bool:
    """Whether a running request is at the first of these pages that is not known yet: soon it can be shared."""
    next_page = digests[num_known : num_known + 1]
    return (
        bool(next_page) and row.num_published <= num_known and row.page_digests[num_known : num_known + 1] == next_page
    )
