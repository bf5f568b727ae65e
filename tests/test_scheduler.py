"""What runs next and what waits: the plans that a scheduler makes. What comes of them is in test_engine_core.py."""

import random
from typing import Any

import pytest

from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.request import FinishReason, Request
from jaxinfer.scheduler import Scheduler
from jaxinfer.step_plan import MAX_CHUNKS, StepPlan, StepResult
from tests.fake_runner import make_core, make_request


def make_scheduler(**overrides: Any) -> Scheduler:
    return make_core(**overrides).scheduler


def add(scheduler: Scheduler, *sizes: tuple[int, int], priority: int = 0) -> list[Request]:
    """Requests of (prompt tokens, max_tokens), which share no page."""
    first = len(scheduler.waiting) + 100 * scheduler.num_running
    requests = [
        make_request(first + i, [first + i] * length, max_tokens, priority=priority)
        for i, (length, max_tokens) in enumerate(sizes)
    ]
    for request in requests:
        scheduler.add(request)
    return requests


def commit(scheduler: Scheduler, plan: StepPlan, token: int = 7) -> list[Request]:
    """Plays the devices: everyone gets `token`, as often as it may."""
    rows = [
        [[token] * min(plan.num_steps, r.max_num_cached - int(start)) for r, start in zip(*shard, strict=True)]
        for shard in zip(plan.rows, plan.starts, strict=True)
    ]
    tokens = [[token] * len(chunks) for chunks in plan.chunks]
    are_finite = [[True] * len(chunks) for chunks in plan.chunks]
    all_true = [[True] * len(shard) for shard in rows]
    touched: list[Request] = []
    scheduler.commit(plan, StepResult(tokens, are_finite, rows, all_true, all_true), touched)
    scheduler.check()
    return touched


def turns(scheduler: Scheduler, most: int = 1000) -> list[StepPlan]:
    """Plans and commits until there is nothing to do."""
    plans = []
    while len(plans) < most and (plan := scheduler.schedule()):
        scheduler.check()
        commit(scheduler, plan)
        plans.append(plan)
    return plans


def spans(plans: list[StepPlan]) -> list[tuple[int, int, int]]:
    """(request, start, stop) of every chunk."""
    return [(c.request.number, c.start, c.stop) for plan in plans for chunks in plan.chunks for c in chunks]


def numbers(requests: list[Request]) -> list[int]:
    return [request.number for request in requests]


def free_pages(scheduler: Scheduler) -> int:
    return sum(allocator.num_free for allocator in scheduler.allocators)


@pytest.mark.parametrize("slots", [1, 4])
def test_order_is_priority_then_arrival(slots: int):
    scheduler = make_scheduler(slots_per_shard=slots, decode_steps=1)
    requests = [make_request(i, [i] * 3, 8, priority=p) for i, p in enumerate([0, 0, -1, 1, -1])]
    for request in random.Random(0).sample(requests, 5):
        scheduler.add(request)
    plans = turns(scheduler)
    assert [number for number, _, _ in spans(plans)] == [2, 4, 0, 1, 3]
    assert max((numbers(plan.rows[0]) for plan in plans), key=len) == [2, 4, 0, 1][:slots]


def test_a_chunk_takes_what_the_rows_leave_of_the_budget():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, (20, 9), (3, 9), (9, 9))
    plans = turns(scheduler)
    assert [spans([plan]) for plan in plans[:4]] == [
        [(0, 0, 8)],
        [(0, 8, 16)],
        [(0, 16, 20), (1, 0, 3), (2, 0, 1)],
        [(2, 1, 7)],
    ]
    assert spans(plans[4:]) == [(2, 7, 9)]


def test_rows_beyond_the_budget_leave_one_token_for_the_chunk():
    scheduler = make_scheduler(max_num_batched_tokens=2)
    add(scheduler, (1, 20), (1, 20), (1, 20), (3, 4))
    plans = turns(scheduler)
    assert spans(plans)[3:] == [(3, 0, 1), (3, 1, 2), (3, 2, 3)]
    assert all(len(plan.rows[0]) == 3 for plan in plans if spans([plan])[:1] > [(3, 0, 0)])


def test_each_shard_fills_its_budget_with_prompts_in_order():
    scheduler = make_scheduler(num_shards=2, slots_per_shard=3, max_num_batched_tokens=8)
    add(scheduler, *[(6, 2)] * 6)
    by_shard = [[[c.request.number for c in chunks] for chunks in plan.chunks] for plan in turns(scheduler)]
    assert by_shard[:3] == [[[0, 2], [1, 3]], [[2, 4], [3, 5]], [[4], [5]]]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_prompts_that_start_alike_wait_for_the_pages_of_the_first(enable_prefix_caching: bool):
    """The stem is prefilled once, by the first; the others start when its pages are known, and then together."""
    scheduler = make_scheduler(enable_prefix_caching=enable_prefix_caching, max_num_batched_tokens=32)
    for number in range(3):
        scheduler.add(make_request(number, [1] * 8 + [2 + number] * 3, 2))
    plans = turns(scheduler)
    once = [(0, 0, 11), (1, 8, 11), (2, 8, 11)]
    assert spans(plans) == (once if enable_prefix_caching else [(0, 0, 11), (1, 0, 11), (2, 0, 10), (2, 10, 11)])
    assert [len(plan.chunks[0]) for plan in plans[:2]] == ([1, 2] if enable_prefix_caching else [3, 1])


def test_what_would_be_padding_mostly_waits_for_the_next_step():
    """Chunks are padded to 4, 16 or 64 tokens; with 17 to 32 there would be more padding than tokens."""
    totals = {}
    for num_tokens in (3, 5, 8, 9, 16, 17, 32, 33, 64):
        scheduler = make_scheduler(max_num_batched_tokens=64)
        scheduler.chunk_policy = ChunkPolicy(64, (4, 16, 64))
        add(scheduler, (num_tokens - 2, 2), (2, 2))
        plans = turns(scheduler)
        totals[num_tokens] = [n for plan in plans if (n := sum(c.num_tokens for c in plan.chunks[0]))]
    assert totals == {
        3: [3], 5: [4, 1], 8: [4, 4], 9: [9], 16: [16], 17: [16, 1], 32: [16, 16], 33: [33], 64: [64],
    }  # fmt: skip


def test_a_step_has_no_more_chunks_than_rows_are_compiled_for():
    scheduler = make_scheduler(slots_per_shard=2 * MAX_CHUNKS, max_num_batched_tokens=100)
    add(scheduler, *[(2, 2)] * (MAX_CHUNKS + 3))
    plans = turns(scheduler)
    assert [len(plan.chunks[0]) for plan in plans[:2]] == [MAX_CHUNKS, 3]


def test_a_request_goes_to_the_shard_with_the_fewest_running():
    scheduler = make_scheduler(num_shards=2)
    add(scheduler, *[(3, 9)] * 3)
    turns(scheduler, 2)
    assert [numbers(rows) for rows in scheduler.running] == [[0, 2], [1]]
    add(scheduler, (3, 9))
    scheduler.schedule()
    assert [len(rows) for rows in scheduler.running] == [2, 2]


def test_rows_take_one_step_while_somebody_waits_and_many_when_not():
    scheduler = make_scheduler(slots_per_shard=2, decode_steps=4)
    add(scheduler, (3, 7), (3, 12), (3, 9))
    assert [plan.num_steps for plan in turns(scheduler)] == [1] * 8 + [4, 4]


def test_an_only_slot_takes_many_steps_whoever_waits():
    """Nothing can join it, and no program of one step is compiled for it."""
    scheduler = make_scheduler(slots_per_shard=1, decode_steps=4)
    add(scheduler, (3, 9), (3, 9))
    assert [plan.num_steps for plan in turns(scheduler)] == [1, 4, 4] * 2


def test_two_shards_of_one_slot_take_one_step_while_somebody_waits():
    scheduler = make_scheduler(num_shards=2, slots_per_shard=1, decode_steps=4)
    add(scheduler, (3, 5), (3, 9), (3, 9))
    assert [plan.num_steps for plan in turns(scheduler, 6)] == [1] * 6


@pytest.mark.parametrize(("pages", "num_steps"), [(4, 4), (3, 1)])
def test_many_steps_are_not_worth_a_preemption(pages: int, num_steps: int):
    """Two rows at the end of their first page: four steps need a page each, and one step does as well with one."""
    scheduler = make_scheduler(pages_per_shard=1 + pages, decode_steps=4)
    add(scheduler, (2, 6), (3, 6))
    turns(scheduler, 2)
    plan = scheduler.schedule()
    assert plan is not None and plan.num_steps == num_steps and scheduler.num_preemptions == 0
    scheduler.check()


def test_many_steps_take_no_page_beyond_the_last_token():
    scheduler = make_scheduler(decode_steps=8)
    add(scheduler, (3, 6))  # 8 tokens in the cache at most
    turns(scheduler, 1)
    scheduler.schedule()
    (shard,) = scheduler.shards
    assert len(shard.page_ids(shard.running[0])) == 2


@pytest.mark.parametrize(("pages", "is_running"), [(7, True), (6, False)])
def test_admission_waits_for_pages(pages: int, is_running: bool):
    """The first has 3 pages and may need another; the second needs 3; nobody overtakes it."""
    scheduler = make_scheduler(pages_per_shard=1 + pages)
    add(scheduler, (8, 8))
    turns(scheduler, 1)
    add(scheduler, (10, 3), (1, 1))
    scheduler.schedule()
    assert numbers(scheduler.running[0])[:2] == ([0, 100] if is_running else [0])
    assert 101 in numbers(scheduler.waiting) and (100 in numbers(scheduler.waiting)) != is_running


def test_admission_waits_for_a_slot():
    scheduler = make_scheduler(slots_per_shard=2)
    add(scheduler, (3, 4), (3, 9), (3, 4))
    for plan in iter(scheduler.schedule, None):
        assert scheduler.num_running <= 2 and scheduler.has_work
        commit(scheduler, plan)
    assert not scheduler.has_work


def test_a_cached_page_that_nobody_holds_is_shared_or_given_and_not_both():
    """Of 7 pages, one row has 2 and 5 are cached: they are all that the next prompt shares, and it needs another."""
    scheduler = make_scheduler(pages_per_shard=8)
    scheduler.add(make_request(0, [*range(21)], 1))
    turns(scheduler)
    add(scheduler, (4, 5))
    turns(scheduler, 1)
    scheduler.add(make_request(1000, [*range(23)], 1))
    plan = scheduler.schedule()
    assert plan is not None and len(scheduler.running[0]) == 1 and free_pages(scheduler) == 5
    commit(scheduler, plan)
    turns(scheduler)
    assert not scheduler.has_work


def test_the_last_in_order_is_preempted_and_starts_over_from_its_output():
    scheduler = make_scheduler(pages_per_shard=1 + 9, decode_steps=1, enable_prefix_caching=False)
    first, last = add(scheduler, (4, 12), (4, 12))
    (urgent,) = add(scheduler, (4, 12), priority=-1)
    while not scheduler.num_preemptions:
        turns(scheduler, 1)
    assert scheduler.waiting == [last] and last.num_preemptions == 1 and not last.is_running
    num_tokens = len(last.token_ids)
    assert num_tokens > 4 and last.num_prefilled == 0
    plans = turns(scheduler)
    assert (last.number, 0, num_tokens) in spans(plans) and last.num_prefill_tokens == num_tokens
    assert [len(r.output_token_ids) for r in (urgent, first, last)] == [12] * 3
    assert urgent.num_preemptions == 0 and free_pages(scheduler) == 9


def test_what_can_never_fit_is_refused_at_once():
    scheduler = make_scheduler(pages_per_shard=9)
    message = (
        "prompt of 30 tokens plus max_tokens 4 needs 9 cache pages and the pool has 8; "
        "raise --kv_cache_bytes or lower max_tokens"
    )
    with pytest.raises(ValueError, match=message):
        add(scheduler, (30, 4))
    assert not scheduler.has_work
    add(scheduler, (30, 3))  # the last token is never cached
    assert len(turns(scheduler)) > 0 and not scheduler.has_work


def preempted_in_flight() -> tuple[Scheduler, StepPlan, Request]:
    """Two requests and four pages: the first takes a page of the last's whose last token is under way."""
    scheduler = make_scheduler(pages_per_shard=1 + 4, decode_steps=1)
    _, last = add(scheduler, (4, 12), (3, 5))
    turns(scheduler, 4)
    under_way = scheduler.schedule()
    assert under_way is not None and last in under_way.rows[0]
    plan = scheduler.schedule()
    assert plan is not None and last not in plan.rows[0] and scheduler.waiting == [last]
    scheduler.check()
    return scheduler, under_way, last


def test_a_request_may_finish_while_it_is_preempted():
    """Once such a request would have been prefilled again and gone on past its end."""
    scheduler, under_way, last = preempted_in_flight()
    assert last in commit(scheduler, under_way)
    assert last.finish_reason is FinishReason.LENGTH and not scheduler.waiting and len(last.output_token_ids) == 5


def test_what_is_under_way_of_an_aborted_request_is_dropped():
    scheduler, under_way, last = preempted_in_flight()
    num_tokens = len(last.token_ids)
    last.finish(FinishReason.ABORT)
    scheduler.release(last)
    assert last not in commit(scheduler, under_way)
    assert len(last.token_ids) == num_tokens and not scheduler.waiting


def test_nobody_waits_for_the_page_of_an_output():
    """It is published when its request stops, which may take long; the prompt ends a token before the page does."""
    scheduler = make_scheduler(decode_steps=1)
    scheduler.add(first := make_request(0, [*range(7)], 40))
    for _ in range(3):
        turns(scheduler, 1)
    scheduler.add(make_request(1, [*first.token_ids[:8], 5], 4))
    scheduler.add(make_request(2, [9] * 5, 4))
    scheduler.schedule()
    assert numbers(scheduler.running[0]) == [0, 1, 2]
