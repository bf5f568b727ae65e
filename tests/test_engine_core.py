"""Requests that are aborted, preempted or failed while steps are under way: what they hold comes back, once."""

import random
from collections.abc import Sequence

import pytest

from jaxinfer.engine_core import EngineCore
from jaxinfer.output_text import OutputText
from jaxinfer.request import FinishReason, Request
from jaxinfer.sampling_params import SamplingParams
from tests.fake_runner import POISON, FakeRunner, make_core, make_request, run, solo


def crowded_core(num_done: int = 0) -> tuple[EngineCore, list[Request]]:
    """Five requests that want three times the pages there are, after so many steps."""
    core = make_core(page_size=4, pages_per_shard=17, slots_per_shard=3, max_num_batched_tokens=8)
    requests = [make_request(i, [i] * 20, 30) for i in range(5)]
    for request in requests:
        core.scheduler.add(request)
    for _ in range(num_done):
        core.step()
    return core, requests


def free_pages(core: EngineCore) -> int:
    return sum(allocator.num_free for allocator in core.scheduler.allocators)


def num_pages(core: EngineCore, request: Request) -> int:
    return len(core.scheduler.shards[0].page_ids(request)) if request.is_running else 0


def expected(request: Request) -> list[int]:
    """What it would have written alone; as much of that as it came to, if it was ended before its time."""
    wanted = solo(request.prompt_token_ids, request.max_tokens)
    return wanted if request.finish_reason is FinishReason.LENGTH else wanted[: len(request.output_token_ids)]


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "preempted"])
def test_an_abort_frees_everything_at_once_and_once(state: str):
    core, requests = crowded_core()
    is_reached = {
        "waiting": lambda r: not r.is_running and not r.num_preemptions,
        "prefilling": lambda r: 0 < r.num_prefilled < r.num_prefill_tokens,
        "decoding": lambda r: r.is_running and len(r.output_token_ids) > 2,
        "preempted": lambda r: not r.is_running and r.num_preemptions,
    }[state]
    while not any(map(is_reached, requests)):
        core.step()
    victim = next(filter(is_reached, requests))
    wanted_free, output = free_pages(core) + num_pages(core, victim), victim.output_token_ids
    for _ in range(2):
        core.abort(victim)
        core.scheduler.check()
        assert victim.finish_reason is FinishReason.ABORT and free_pages(core) == wanted_free
        assert not victim.is_running and victim not in core.scheduler.waiting
    run(core, [])
    assert victim.output_token_ids == output  # what was under way is dropped
    assert [r.output_token_ids for r in requests] == [expected(r) for r in requests]
    assert sum(r.finish_reason is FinishReason.LENGTH for r in requests) == 4


def test_an_abort_of_the_only_request_leaves_nothing_to_wait_for():
    core = make_core()
    core.scheduler.add(request := make_request(0, [1, 2, 3], 9))
    core.step()
    core.abort(request)
    assert core.has_work  # the step under way
    assert core.step() == [] and not core.has_work
    assert core.step() == []


def test_an_abort_lets_the_next_one_in_within_two_steps():
    core = make_core(slots_per_shard=2)
    requests = [make_request(i, [i] * 5, 40) for i in range(3)]
    for request in requests:
        core.scheduler.add(request)
    while len(requests[1].output_token_ids) < 5:
        core.step()
    slot = requests[0].slot
    core.abort(requests[0])
    core.step()
    assert requests[2].is_running and requests[2].slot == slot
    core.step()
    assert len(requests[2].output_token_ids) == 1
    run(core, [])
    assert [r.output_token_ids for r in requests] == [expected(r) for r in requests]


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_a_thousand_cancellations_leak_nothing(late: float):
    """Also where many steps wait for their programs."""
    core, rng = make_core(pages_per_shard=25, num_shards=2), random.Random(0)
    fake(core).is_late = lambda: rng.random() < late
    requests: list[Request] = []
    num_aborted = 0
    while num_aborted < 1000:
        live = [r for r in requests if r.finish_reason is None]
        if len(live) < 12:
            requests.append(make_request(len(requests), [rng.randrange(9)] * rng.randint(1, 40), rng.randint(1, 20)))
            core.scheduler.add(requests[-1])
        elif rng.random() < 0.5:
            core.abort(rng.choice(live))
            num_aborted += 1
        else:
            core.step()
        core.scheduler.check()
    run(core, [])
    assert free_pages(core) == 48
    assert [r.output_token_ids for r in requests] == [expected(r) for r in requests]


def test_the_tokens_of_a_step_come_one_turn_later_and_once():
    core = make_core(decode_steps=1)
    core.scheduler.add(request := make_request(0, [1, 2, 3], 3))
    lengths = []
    while core.has_work:
        touched = core.step()
        lengths.append(len(request.output_token_ids))
        assert touched == ([request] if lengths[-1] > (lengths[-2] if len(lengths) > 1 else 0) else [])
    assert lengths == [0, 1, 2, 3] and request.finish_reason is FinishReason.LENGTH


def test_tokens_that_are_there_do_not_wait_for_the_next_program():
    core = make_core(decode_steps=1)
    fake(core).is_late = lambda: True
    core.scheduler.add(request := make_request(0, [1, 2, 3], 3))
    lengths = []
    while core.has_work:
        core.step()
        lengths.append(len(request.output_token_ids))
    assert lengths == [0, 1, 1, 2, 2, 3] and request.output_token_ids == expected(request)


def test_a_piece_of_a_prompt_gives_nobody_a_token_and_an_error_is_reported():
    core = make_core(max_num_batched_tokens=8)
    good, bad = make_request(0, [*range(20)], 1), make_request(1, [POISON], 5)
    core.scheduler.add(good)
    assert [core.step() for _ in range(4)] == [[], [], [], [good]]
    core.scheduler.add(bad)
    assert [core.step() for _ in range(2)] == [[], [bad]] and bad.finish_reason is FinishReason.ERROR


def test_the_cache_is_not_forgotten_under_who_relies_on_it():
    core, _ = crowded_core(3)
    with pytest.raises(AssertionError, match="running requests rely on the cache"):
        core.scheduler.forget_cache()


@pytest.mark.parametrize("late", [0.0, 0.5])
@pytest.mark.parametrize("at", ["dispatch", "read"])
def test_a_failed_step_ends_what_ran_and_keeps_what_waits(at: str, late: float):
    """After any number of steps. Whoever was preempted in the step that failed must not wait for its last token."""
    num_preempted, rng = 0, random.Random(0)
    for num_done in range(1, 40, 3):
        core, requests = crowded_core(num_done)
        fake(core).is_late = lambda: rng.random() < late
        fail(core, at)
        assert [r.finish_reason for r in core.scheduler.waiting] == [None] * len(core.scheduler.waiting)
        num_preempted += any(r.num_preemptions for r in core.scheduler.waiting)
        assert free_pages(core) == 16 and not core.scheduler.num_running
        failed = [r for r in requests if r.finish_reason is FinishReason.ERROR]
        assert failed and core.has_work and core.step()[: len(failed)] == failed
        for _ in range(500):
            core.step()
            core.scheduler.check()
        assert not core.has_work and free_pages(core) == 16
        assert [r.output_token_ids for r in requests] == [expected(r) for r in requests]
        assert all(r.finish_reason in (FinishReason.ERROR, FinishReason.LENGTH) for r in requests)
    assert num_preempted > 0


class FailingStream:
    """Of tokens whose second cannot be decoded."""

    num_added = 0

    def add(self, token_ids: Sequence[int]) -> str:
        self.num_added += len(token_ids)
        if self.num_added > 1:
            raise ValueError("no text")
        return "first"

    def finish(self) -> str:
        return " and last"


@pytest.mark.parametrize("when", ["each token", "now and then", "at the end"])
def test_a_text_that_cannot_be_decoded_ends_its_own_request_only(when: str):
    core = make_core(decode_steps=1)
    good, bad = make_request(0, [1] * 4, 9), make_request(1, [2] * 4, 9)
    bad.text = OutputText(FailingStream(), ("x",) if when == "each token" else ())  # pyright: ignore
    if when == "each token":
        bad.params, bad.watches_tokens = SamplingParams(stop=["x"]), True
    for request in (good, bad):
        core.scheduler.add(request)
    while core.has_work:
        core.step()
        core.scheduler.check()
        if when == "now and then":
            assert bad.output_text in ("", "first")
    assert good.output_token_ids == expected(good) and good.finish_reason is FinishReason.LENGTH
    assert bad.finish_reason is FinishReason.ERROR and free_pages(core) == 64
    assert len(bad.output_token_ids) == {"each token": 2, "now and then": 3, "at the end": 9}[when]


@pytest.mark.parametrize("at", ["dispatch", "read"])
def test_no_page_is_found_again_after_a_failed_step(at: str):
    core = make_core()
    prompt = [*range(20)]
    run(core, [done := make_request(0, prompt, 3)])
    assert core.scheduler.allocators[0].num_cached(done.page_digests)[0] > 0
    core.scheduler.add(make_request(1, prompt, 3))
    fail(core, at)
    assert core.scheduler.allocators[0].num_cached(done.page_digests)[0] == 0
    before = core.stats.prefill_tokens
    run(core, [again := make_request(2, prompt, 3)])
    assert again.output_token_ids == expected(again) == done.output_token_ids
    assert core.stats.prefill_tokens - before == 20


def fake(core: EngineCore) -> FakeRunner:
    assert isinstance(core.runner, FakeRunner)
    return core.runner


def fail(core: EngineCore, at: str) -> None:
    """Steps until the runner has raised."""
    fake(core).fail_at = at
    with pytest.raises(RuntimeError, match=f"failed at {at}"):
        run(core, [])
    core.scheduler.check()
