"""Mistakes in scheduling and in handing out pages, each planted by one patch: random loads must notice every one."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxinfer import engine_core
from jaxinfer import request as requests_module
from jaxinfer.page_allocator import PageAllocator
from jaxinfer.request import FinishReason, Request
from jaxinfer.scheduler import Scheduler
from jaxinfer.shard import Shard
from jaxinfer.slot_table import SlotTable
from jaxinfer.step_plan import StepPlan, StepResult
from tests.campaign import campaign, report
from tests.fake_runner import VOCAB_SIZE, make_core
from tests.test_random_schedules import LONGEST, expected, random_request

Method = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Fault:
    """`make` takes the method `owner.name` and gives the mistaken one."""

    what: str
    owner: Any
    name: str
    make: Callable[[Method], Method]

    def __str__(self) -> str:
        return self.what.replace(" ", "_")


def _publish_a_prompt_at_its_first_piece(publish: Method) -> Method:
    return lambda self, request, num_cached: publish(self, request, len(request.token_ids))


def _digest_without_what_comes_before(extend: Method) -> Method:
    def mistaken(digests: list[bytes], token_ids: list[int], page_size: int, salt: bytes) -> None:
        for start in range(len(digests) * page_size, len(token_ids) - page_size + 1, page_size):
            of_page: list[bytes] = []
            extend(of_page, token_ids[start : start + page_size], page_size, salt)
            digests += of_page

    return mistaken


def _free_what_others_hold(free: Method) -> Method:
    def mistaken(self: PageAllocator, pages: list[int]) -> None:
        self.num_holders.update({page: 1 for page in pages if page in self.num_holders})
        free(self, pages)

    return mistaken


def _keep_the_digest_of_an_evicted_page(allocate: Method) -> Method:
    def mistaken(self: PageAllocator, count: int, after: int | None = None) -> list[int]:
        page_of, digest_of = dict(self._page_of), dict(self._digest_of)
        pages = allocate(self, count, after)
        self._page_of, self._digest_of = page_of, digest_of
        return pages

    return mistaken


def _lose_a_page_of_each_sequence(free: Method) -> Method:
    return lambda self, pages: free(self, pages[1:])


def _start_over_from_the_prompt_alone(start: Method) -> Method:
    def mistaken(self: Scheduler, request: Request, shard: Shard) -> None:
        start(self, request, shard)
        request.num_prefill_tokens = request.num_prompt_tokens

    return mistaken


def _admit_with_tokens_under_way(admit: Method) -> Method:
    def mistaken(self: Scheduler) -> None:
        for request in self.waiting:
            request.last_step = 0
        admit(self)

    return mistaken


def _take_the_tokens_of_an_aborted_request(commit: Method) -> Method:
    def mistaken(self: Scheduler, plan: StepPlan, result, touched: list[Request]) -> None:
        requests = [chunk.request for chunks in plan.chunks for chunk in chunks] + [
            r for rows in plan.rows for r in rows
        ]
        for request in requests:
            if request.finish_reason is FinishReason.ABORT:
                request.token_ids.append(0)
        commit(self, plan, result, touched)

    return mistaken


def _publish_the_pages_of_a_poisoned_row(release: Method) -> Method:
    def mistaken(self: Scheduler, request: Request) -> None:
        if request.finish_reason is FinishReason.ERROR and request.is_running:
            self._publish(request, len(request.token_ids) - 1)
        release(self, request)

    return mistaken


def _prefill_nothing_of_a_cached_prompt(usable: Method) -> Method:
    return lambda self, page_size: self.page_digests[: len(self.token_ids) // page_size]


def _find_pages_in_another_shard(start: Method) -> Method:
    def mistaken(self: Scheduler, request: Request, shard: Shard) -> None:
        own, shard.allocator = shard.allocator, self.shards[1 - shard.index].allocator
        start(self, request, shard)
        shard.allocator = own

    return mistaken


def _grow_a_page_late(starved: Method) -> Method:
    return lambda self: starved(self)[1:]


def _forget_how_many_tokens_are_left(decode: Method) -> Method:
    def mistaken(self: Shard, slots: np.ndarray, num_steps: int) -> np.ndarray:
        starts = decode(self, slots, num_steps)
        self._positions[slots] = starts
        return starts

    return mistaken


def _leave_a_stopped_request_in_its_slot(clear: Method) -> Method:
    return lambda self, shard, slot: None


def _see_no_end(step_result: Method) -> Method:
    def mistaken(*args: Any) -> StepResult:
        result = step_result(*args)
        return dataclasses.replace(result, row_may_end=[[False for _ in rows] for rows in result.row_may_end])

    return mistaken


FAULTS = [
    Fault("publish a prompt at its first piece", Scheduler, "_publish", _publish_a_prompt_at_its_first_piece),
    Fault("digest without what comes before", requests_module, "extend_digests", _digest_without_what_comes_before),
    Fault("free what others hold", PageAllocator, "free", _free_what_others_hold),
    Fault("keep the digest of an evicted page", PageAllocator, "allocate", _keep_the_digest_of_an_evicted_page),
    Fault("lose a page of each sequence", PageAllocator, "free", _lose_a_page_of_each_sequence),
    Fault("start over from the prompt alone", Scheduler, "_start", _start_over_from_the_prompt_alone),
    Fault("admit with tokens under way", Scheduler, "_admit", _admit_with_tokens_under_way),
    Fault("take the tokens of an aborted request", Scheduler, "commit", _take_the_tokens_of_an_aborted_request),
    Fault("publish the pages of a poisoned row", Scheduler, "release", _publish_the_pages_of_a_poisoned_row),
    Fault("prefill nothing of a cached prompt", Request, "shareable_digests", _prefill_nothing_of_a_cached_prompt),
    Fault("find pages in another shard", Scheduler, "_start", _find_pages_in_another_shard),
    Fault("grow a page late", Shard, "starved", _grow_a_page_late),
    Fault("forget what the step under way will do", Shard, "decode", _forget_how_many_tokens_are_left),
    Fault("leave a stopped request in its slot", SlotTable, "clear", _leave_a_stopped_request_in_its_slot),
    Fault("see no end", engine_core, "step_result", _see_no_end),
]


def find_fault(num_loads: int) -> str:
    """What random loads show to be wrong; nothing if they find no fault.

    Everything happens in them: both shards, preemption, aborts, shared stems, equal pages at other places, and now
    and then a row that writes what is not finite.
    """
    for seed in range(num_loads):
        rng = random.Random(seed)
        core = make_core(num_shards=2, page_size=2, pages_per_shard=50, max_num_batched_tokens=9)
        vocab_size = (VOCAB_SIZE, 2)[seed % 2]
        stem = [rng.randrange(vocab_size) for _ in range(LONGEST)]
        num_spoilt = 0

        def spoil(core=core, rng=rng) -> None:
            nonlocal num_spoilt
            if rng.random() < 0.05:
                core.runner.spoil_next = True  # pyright: ignore[reportAttributeAccessIssue]
                num_spoilt += 1

        def make(number: int, rng=rng, stem=stem, vocab_size=vocab_size) -> Request:
            return random_request(rng, number, LONGEST, stem, vocab_size)

        try:
            requests = campaign(core, rng, 300, make, preempt_every=5, after_step=spoil)
        except (AssertionError, AttributeError, IndexError, KeyError, ValueError, RuntimeError) as error:
            return f"load {seed}: {type(error).__name__}: {error}"
        result = report(core, requests, expected)
        result["errors"] = max(0, result["errors"] - num_spoilt)  # of rows that were not spoilt
        if wrong := {name: result[name] for name in ("mismatching requests", "leaked pages", "errors") if result[name]}:
            return f"load {seed}: {wrong}"
    return ""


def test_without_a_fault_nothing_is_found():
    assert find_fault(3) == ""


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_fault_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fault.owner, fault.name, fault.make(getattr(fault.owner, fault.name)))
    found = find_fault(10)
    print(f"{fault.what}: {found}")
    assert found
