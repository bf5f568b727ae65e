"""Scheduler and page allocator: no page is ever lost, shared or handed out twice, whatever happens."""

import itertools
import random

import pytest

from jaxinfer.output_text import OutputText
from jaxinfer.page_allocator import PageAllocator
from jaxinfer.request import FinishReason, Request, SamplingParams
from jaxinfer.scheduler import DecodePlan, PrefillPlan, Scheduler


def request(name: str, prompt_tokens: int, max_tokens: int) -> Request:
    return Request(
        request_id=name,
        prompt=None,
        prompt_token_ids=[1] * prompt_tokens,
        params=SamplingParams(max_tokens=max_tokens),
        stop_token_ids=(),
        max_tokens=max_tokens,
        seed=0,
        text=OutputText(None, ()),
    )


def scheduler(**overrides: int) -> Scheduler:
    sizes = {"num_shards": 1, "pages_per_shard": 9, "page_size": 4, "slots_per_shard": 2, "chunk_tokens": 8}
    return Scheduler(**{**sizes, **overrides})


def run_plan(s: Scheduler, plan: PrefillPlan | DecodePlan) -> list[Request]:
    """Plays the device: every chunk is cached, every row gets a token. Returns the requests that finished."""
    touched = []
    if isinstance(plan, PrefillPlan):
        for chunk in filter(None, plan.chunks):
            chunk.request.num_cached = chunk.stop
            if chunk.is_last:
                chunk.request.append([7])
                touched.append(chunk.request)
    else:
        for row in itertools.chain(*plan.rows):
            row.num_cached += 1
            row.append([7])
            touched.append(row)
    finished = [r for r in touched if r.finish_reason is not None]
    for r in finished:
        s.release(r)
    return finished


def test_prompts_run_in_chunks_and_in_order_of_arrival():
    s = scheduler()
    for name, length in (("a", 20), ("b", 3), ("c", 3)):
        s.add(request(name, length, 4))
    spans = []
    while isinstance(plan := s.schedule(), PrefillPlan):
        spans += [(c.request.request_id, c.start, c.stop) for c in plan.chunks if c]
        run_plan(s, plan)
    # c waits: there are two slots
    assert spans == [("a", 0, 8), ("a", 8, 16), ("a", 16, 20), ("b", 0, 3)]
    assert isinstance(plan, DecodePlan) and [r.request_id for r in plan.rows[0]] == ["a", "b"]
    assert [r.request_id for r in s.waiting] == ["c"]


def test_nobody_overtakes_a_request_that_waits_for_pages():
    s = scheduler(slots_per_shard=3)
    s.add(request("big", 20, 4))  # 6 of 8 pages
    s.add(request("also big", 20, 4))
    s.add(request("small", 1, 1))
    s.schedule()
    assert [r.request_id for r in s.waiting] == ["also big", "small"]


def test_a_request_goes_to_the_shard_with_the_fewest_running():
    s = scheduler(num_shards=2)
    for name in "abc":
        s.add(request(name, 3, 1))
    s.schedule()
    assert [[r.request_id for r in rows] for rows in s.running] == [["a", "c"], ["b"]]


def test_what_can_never_fit_is_refused_at_once():
    with pytest.raises(ValueError, match=r"needs 9 cache pages and the pool has 8; raise --kv_cache_bytes"):
        scheduler().add(request("huge", 30, 4))


def test_random_schedules_lose_no_page():
    """Random arrivals, lengths and aborts; invariants after every step; everything finishes and all pages return."""
    rng = random.Random(0)
    s = scheduler(num_shards=2, slots_per_shard=3, pages_per_shard=17)
    requests, finished, steps = [], set(), 0
    while len(finished) < 300:
        steps += 1
        if len(requests) < 300 and rng.random() < 0.5:
            requests.append(request(str(len(requests)), rng.randint(1, 40), rng.randint(1, 24)))
            s.add(requests[-1])
        live = [r for r in requests if r.finish_reason is None]
        if live and rng.random() < 0.05:
            victim = rng.choice(live)
            victim.finish(FinishReason.ABORT)
            s.release(victim)
            finished.add(victim.request_id)
        if plan := s.schedule():
            finished |= {r.request_id for r in run_plan(s, plan)}
        s.check()
    assert not s.has_work and steps < 20_000
    assert all(a.num_free == a.num_usable_pages for a in s.allocators)


def test_allocator_refuses_a_double_free_and_takes_nothing_then():
    allocator = PageAllocator(5)
    pages = allocator.allocate(3)
    allocator.free(pages[:1])
    with pytest.raises(RuntimeError, match="not all held"):
        allocator.free(pages)
    assert allocator.num_free == 2
    allocator.check()


def test_allocator_never_hands_out_the_scratch_page():
    allocator = PageAllocator(5)
    assert sorted(allocator.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="1 pages asked for, 0 free"):
        allocator.allocate(1)


def test_check_finds_a_lost_page():
    """The twin of the checks above: an allocator that forgets a page is found out."""
    allocator = PageAllocator(5)
    allocator._held.remove(allocator.allocate(1)[0])
    with pytest.raises(AssertionError, match="lost"):
        allocator.check()
