"""One data shard: its slots and pages, and who holds them. Host only.

It does what the scheduler decides, and knows nothing of other shards.
"""

import dataclasses
from bisect import insort
from collections.abc import Sequence

import numpy as np

from jaxinfer.integers import cdiv
from jaxinfer.page_allocator import PageAllocator
from jaxinfer.request import Request
from jaxinfer.slot_table import SlotTable
from jaxinfer.step_plan import MAX_CHUNKS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSizes:
    """What data shards have.

    Attributes:
      num_shards: how many there are.
      slots_per_shard: sequences that run at once.
      pages_per_shard: on all `context_size` devices of a shard, scratch pages included.
      page_size: tokens per page.
      max_model_len: tokens of the longest sequence.
      context_size: devices over which the pages of a sequence are spread.
    """

    num_shards: int
    slots_per_shard: int
    pages_per_shard: int
    page_size: int
    max_model_len: int
    context_size: int = 1


class Shard:
    """The requests that run there.

    Attributes:
      index: among the data shards.
      allocator: of its pages.
      running: in order of priority, then of arrival.
      prefilling: those of them whose prompts are not all in steps yet.
    """

    def __init__(self, index: int, allocator: PageAllocator, page_size: int, table: SlotTable):
        self.index = index
        self.allocator = allocator
        self.running: list[Request] = []
        self.prefilling: list[Request] = []
        self._page_size = page_size
        self._table = table
        self._positions, self._limits = table.positions[index], table.limits[index]
        self._num_pages, self._block_tables = table.num_pages[index], table.block_tables[index]
        self._num_slots = len(self._positions) - 1  # the last row is padding
        self._free_slots = [*range(self._num_slots - 1, -1, -1)]
        self._by_slot: list[Request | None] = [None] * self._num_slots

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def decoding(self) -> np.ndarray:
        """The slots of those that generate a token in the next step, unless the one under way ends them."""
        return np.flatnonzero(self._positions < self._limits)

    def starved(self) -> np.ndarray:
        """Those of them that have no page for it."""
        return np.flatnonzero((self._positions == self._num_pages * self._page_size) & (self._positions < self._limits))

    def num_missing_pages(self, slots: np.ndarray, num_steps: int) -> np.ndarray:
        """How many more pages each needs for so many tokens, or for as many as it may still generate."""
        ends = np.minimum(self._positions[slots] + num_steps, self._limits[slots])
        return -(-ends // self._page_size) - self._num_pages[slots]

    def give_page(self, slots: np.ndarray) -> None:
        """One to each. The caller has checked that they are there."""
        if len(slots):
            num_pages = self._num_pages[slots]
            last_pages = self._block_tables[slots, num_pages - 1]
            self._block_tables[slots, num_pages] = self.allocator.extend(last_pages.tolist())
            self._num_pages[slots] = num_pages + 1

    def requests(self, slots: np.ndarray) -> list[Request]:
        return [self._by_slot[slot] for slot in slots.tolist()]  # pyright: ignore[reportReturnType]

    def page_ids(self, request: Request) -> list[int]:
        """Of one that runs here, in order of position."""
        return self._block_tables[request.slot, : self._num_pages[request.slot]].tolist()

    def can_start(self, request: Request) -> bool:
        """Whether there is room for a request: not while somebody is about to fill a page that it could share.

        There must be pages for it and for the others to grow, or it would be preempted at once.
        """
        digests = request.shareable_digests(self._page_size)
        num_cached, num_evictable = self.allocator.num_cached(digests)
        if any(_will_publish(row, digests, num_cached, self._page_size) for row in self.running):
            return False
        needed = cdiv(min(len(request.token_ids) + 1, request.max_num_cached), self._page_size) - num_cached
        return needed + len(self.running) <= self.allocator.num_free - num_evictable

    def start(self, request: Request) -> None:
        """Takes a request in, on top of what is cached of its pages."""
        slot = self._free_slots.pop()
        request.shard, request.slot, self._by_slot[slot] = self.index, slot, request
        pages = self.allocator.share(request.shareable_digests(self._page_size))
        request.num_published, request.num_prefilled = len(pages), len(pages) * self._page_size
        request.num_prefill_tokens = len(request.token_ids)
        num_missing = cdiv(request.num_prefill_tokens, self._page_size) - len(pages)
        pages += self.allocator.allocate(num_missing, after=pages[-1] if pages else None)
        self._block_tables[slot, : len(pages)] = pages
        self._num_pages[slot] = len(pages)
        self._table.put(self.index, slot, request)
        for requests in (self.running, self.prefilling):
            insort(requests, request, key=lambda r: r.order)

    def stop(self, request: Request) -> None:
        """Takes it out, and frees its slot and pages."""
        self.running.remove(request)
        if request in self.prefilling:
            self.prefilling.remove(request)
        self.allocator.free(self.page_ids(request))
        self._table.clear(self.index, request.slot)
        self._by_slot[request.slot] = None
        self._free_slots.append(request.slot)
        request.slot, request.num_prefilled, request.num_published = -1, 0, 0

    def prefill(self, request: Request, stop: int) -> None:
        """Its prompt is in steps up to token `stop`; at its end it decodes from the next step on."""
        request.num_prefilled = stop
        if request.is_prefilled:
            self.prefilling.remove(request)
            self._positions[request.slot], self._limits[request.slot] = stop, request.max_num_cached

    def decode(self, slots: np.ndarray, num_steps: int) -> np.ndarray:
        """Each generates so many tokens, or as many as it may. The positions of the first."""
        starts = self._positions[slots]
        self._positions[slots] = np.minimum(starts + num_steps, self._limits[slots])
        return starts

    def publish(self, request: Request, num_tokens: int) -> None:
        """Lets others share the full pages of its first tokens, which are in the cache: more than when last called."""
        start, stop = request.num_published, num_tokens // self._page_size
        request.extend_digests(self._page_size)
        page_ids = self._block_tables[request.slot, start:stop].tolist()
        for page_id, digest in zip(page_ids, request.page_digests[start:stop], strict=True):
            self.allocator.publish(page_id, digest)
        request.num_published = stop

    def check(self) -> None:
        """Raises AssertionError unless pages, slots and requests agree."""
        self.allocator.check()
        rows = self.running
        assert rows == sorted(rows, key=lambda r: r.order)
        holders: dict[int, int] = {}
        for page in (page for request in rows for page in self.page_ids(request)):
            holders[page] = holders.get(page, 0) + 1
        assert holders == self.allocator.num_holders, "requests and allocator disagree about who holds what"
        slots = [request.slot for request in rows] + self._free_slots
        assert sorted(slots) == [*range(self._num_slots)], "a slot is lost or taken twice"
        assert all(r.shard == self.index and self._by_slot[r.slot] is r and r.finish_reason is None for r in rows)
        assert self.prefilling == [r for r in rows if not r.is_prefilled]
        assert len(self.prefilling) <= MAX_CHUNKS, "more prompts than a step has chunks"
        held = self._num_pages * self._page_size
        assert (self._positions <= self._limits).all() and (self._positions <= held).all()
        assert all(self._limits[r.slot] == (r.max_num_cached if r.is_prefilled else 0) for r in rows)
        for column in (self._positions, self._limits, self._num_pages):
            assert not column[[*self._free_slots, -1]].any(), "a slot that nobody has is not empty"
        unused = np.arange(self._block_tables.shape[1]) >= self._num_pages[:, None]
        assert not self._block_tables[unused].any(), "a page that is not held is in a block table"


def _will_publish(row: Request, digests: Sequence[bytes], num_known: int, page_size: int) -> bool:
    """Whether the first of these pages that is not known yet is in what a running request prefills: soon it is shared.

    Not if it is in its output, which is published when it stops.
    """
    next_page, is_prefilled_there = digests[num_known : num_known + 1], num_known < row.num_prefill_tokens // page_size
    return (
        bool(next_page)
        and row.num_published <= num_known
        and is_prefilled_there
        and row.page_digests[num_known : num_known + 1] == next_page
    )
