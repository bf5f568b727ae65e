"""Chooses what runs next. Host only: requests, ints, no arrays.

    add -> waiting -> (a slot and pages are free) -> running: prefilled piece by piece, then decoded -> finished

First come, first served: the request at the head of the queue waits for a slot and for all the pages that it can
ever need, and nobody overtakes it, so a running request never runs out of pages. With `data` in the mesh each
shard has its own slots and pages, and a request goes to the shard that has the fewest running.
"""

import dataclasses
from collections import deque

from jaxinfer.page_allocator import PageAllocator
from jaxinfer.request import Request


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a prompt: tokens [start, stop) of `request`."""

    request: Request
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == len(self.request.prompt_token_ids)


@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """At most one chunk per data shard."""

    chunks: list[Chunk | None]  # by shard


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """The requests that decode, by shard."""

    rows: list[list[Request]]


StepPlan = PrefillPlan | DecodePlan


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Scheduler:
    """Waiting and running requests, and who holds which pages."""

    def __init__(
        self, *, num_shards: int, pages_per_shard: int, page_size: int, slots_per_shard: int, chunk_tokens: int
    ):
        self.page_size = page_size
        self.slots_per_shard = slots_per_shard
        self.chunk_tokens = chunk_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[list[Request]] = [[] for _ in range(num_shards)]
        self.allocators = [PageAllocator(pages_per_shard) for _ in range(num_shards)]

    @property
    def num_running(self) -> int:
        return sum(map(len, self.running))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    def num_pages_for(self, request: Request) -> int:
        return cdiv(request.max_num_tokens, self.page_size)

    def check_fits(self, request: Request) -> None:
        """Raises ValueError for a request that not even an empty shard could hold."""
        needed, usable = self.num_pages_for(request), self.allocators[0].num_usable_pages
        if needed > usable:
            raise ValueError(
                f"prompt of {len(request.prompt_token_ids)} tokens plus max_tokens {request.max_tokens} needs {needed} "
                f"cache pages and the pool has {usable}; raise --kv_cache_bytes or lower max_tokens"
            )

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError for one that can never fit."""
        self.check_fits(request)
        self.waiting.append(request)

    def schedule(self) -> StepPlan | None:
        """What to run now; None if there is nothing. Prompts first, so that first tokens come early."""
        self._admit()
        chunks = [self._next_chunk(rows) for rows in self.running]
        if any(chunks):
            return PrefillPlan(chunks)
        return DecodePlan([list(rows) for rows in self.running]) if self.num_running else None

    def release(self, request: Request) -> None:
        """Frees the slot and pages of a finished request, or takes it out of the queue. Once per request."""
        if request in self.waiting:
            self.waiting.remove(request)
            return
        self.running[request.shard].remove(request)
        self.allocators[request.shard].free(request.page_ids)
        request.page_ids = []

    def check(self) -> None:
        """Raises AssertionError unless pages, slots and requests agree."""
        for shard, (rows, allocator) in enumerate(zip(self.running, self.allocators, strict=True)):
            allocator.check()
            held = [page for request in rows for page in request.page_ids]
            assert len(held) == len(set(held)), "two requests share a page"
            assert len(held) + allocator.num_free == allocator.num_usable_pages, "a page is held by nobody"
            assert len(rows) <= self.slots_per_shard
            assert all(r.shard == shard and r.finish_reason is None for r in rows)
            assert all(r.num_cached <= len(r.page_ids) * self.page_size for r in rows)

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            needed = self.num_pages_for(request)
            shards = [
                shard
                for shard, rows in enumerate(self.running)
                if len(rows) < self.slots_per_shard and self.allocators[shard].num_free >= needed
            ]
            if not shards:
                return
            request.shard = min(shards, key=lambda shard: len(self.running[shard]))
            request.page_ids = self.allocators[request.shard].allocate(needed)
            self.running[request.shard].append(self.waiting.popleft())

    def _next_chunk(self, rows: list[Request]) -> Chunk | None:
        for request in rows:
            if not request.is_prefilled:
                start, end = request.num_cached, len(request.prompt_token_ids)
                return Chunk(request, start, min(end, start + self.chunk_tokens))
        return None
