"""Whatever the scheduler decides, nobody can tell from the output: random loads against one request at a time.

On the fake runner of `tests/fake_runner.py`, which no page error gets past. The long campaign:

    JAXINFER_TEST_STEPS=10000 pytest tests/test_random_schedules.py -s
"""

import os
import random

import pytest

from jaxinfer.request import FinishReason, Request
from jaxinfer.step_plan import MAX_CHUNKS
from tests.campaign import campaign, report
from tests.fake_runner import POISON, VOCAB_SIZE, make_core, make_request, missing_logprobs, run, solo

NUM_STEPS = int(os.environ.get("JAXINFER_TEST_STEPS", "1200"))
LONGEST = 64  # tokens of prompt and output


def random_request(
    rng: random.Random, number: int, longest: int, stem: list[int], vocab_size: int = VOCAB_SIZE
) -> Request:
    """Half of them start with a common stem, some have stop tokens, some want log-probabilities.

    `vocab_size` is the prompts'.
    """
    max_tokens = rng.randint(1, longest // 2)
    length = rng.randint(1, longest - max_tokens)
    prompt = [rng.randrange(vocab_size) for _ in range(length)]
    if rng.random() < 0.5:
        prompt = (stem + prompt)[:length]
    stop = tuple(rng.sample(range(VOCAB_SIZE), 8)) if rng.random() < 0.5 else ()
    priority, with_logprobs = rng.choice([0, 0, 0, 1, -1]), rng.random() < 0.3
    return make_request(number, prompt, max_tokens, stop, priority, with_logprobs)


def expected(request: Request) -> list[int]:
    return solo(request.prompt_token_ids, request.max_tokens, request.stop_token_ids)


@pytest.mark.parametrize("preempt_every", [0, 3])
@pytest.mark.parametrize("enable_prefix_caching", [False, True], ids=["cold", "prefix"])
@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("decode_steps", [1, 4])
def test_random_schedules_equal_solo(
    preempt_every: int, enable_prefix_caching: bool, num_shards: int, page_size: int, chunk: int, decode_steps: int
):
    """A pool of a sequence and a half for four slots: preemption is the rule, not the exception."""
    core = make_core(
        num_shards=num_shards,
        page_size=page_size,
        pages_per_shard=1 + LONGEST * 3 // 2 // page_size,
        max_num_batched_tokens=chunk,
        decode_steps=decode_steps,
        enable_prefix_caching=enable_prefix_caching,
        min_chunk=4,  # so that chunks are cut to 4 and 16 tokens
    )
    rng = random.Random(f"{num_shards} {page_size} {chunk} {decode_steps}")
    stem = [rng.randrange(VOCAB_SIZE) for _ in range(LONGEST)]
    requests = campaign(
        core,
        rng,
        NUM_STEPS // 20,
        lambda number: random_request(rng, number, LONGEST, stem),
        preempt_every=preempt_every,
    )
    result = report(core, requests, expected)
    print(result)
    missing = sum(missing_logprobs(request) for request in requests if request.logprobs is not None)
    assert result["mismatching requests"] == result["errors"] == result["leaked pages"] == missing == 0
    assert result["finished"] > 0 and (result["preemptions"] > 0 or not preempt_every)


def test_a_starved_pool_finishes_everything():
    """A pool of one longest sequence, 500 requests: preempted often, never stuck, first come first done."""
    core = make_core(page_size=4, pages_per_shard=17, slots_per_shard=8, max_num_batched_tokens=32)
    rng = random.Random(0)
    requests = [random_request(rng, i, LONGEST, []) for i in range(500)]
    for request in requests:
        request.priority = 0
    run(core, requests)
    counts = [request.num_preemptions for request in requests]
    print(f"finished 500, preemptions: mean {sum(counts) / 500:.2f}, most {max(counts)}; {core.stats.steps} steps")
    assert [r.output_token_ids for r in requests] == [expected(r) for r in requests]
    assert core.scheduler.num_preemptions > 0


def test_the_first_in_order_is_never_preempted():
    core = make_core(page_size=4, pages_per_shard=17, slots_per_shard=4)
    requests = [make_request(i, [i] * 20, 40) for i in range(4)]
    run(core, requests)
    assert requests[0].num_preemptions == 0 and core.scheduler.num_preemptions > 0
    assert [r.finish_time for r in requests] == sorted(r.finish_time or 0 for r in requests)


def test_a_row_that_is_not_finite_ends_alone_and_is_not_cached():
    """Its pages once could be found by the next request with the same prompt, which then ended, too."""
    core = make_core(page_size=4, max_num_batched_tokens=8)
    poisoned = [make_request(i, [1, 2, 3, 4, POISON, *range(20)], 5) for i in (0, 2)]
    good = [make_request(i, [1, 2, 3, 4, *range(20)], 5) for i in (1, 3)]
    run(core, poisoned + good)
    assert [r.finish_reason for r in poisoned] == [FinishReason.ERROR] * 2
    assert [r.output_token_ids for r in poisoned] == [[], []]
    assert [r.output_token_ids for r in good] == [expected(r) for r in good]
    held = core.scheduler.allocators[0]
    assert held.num_cached(poisoned[0].page_digests)[0] == 1  # the page before the poison


def test_a_shared_prefix_is_prefilled_once():
    core = make_core(page_size=4, max_num_batched_tokens=64, slots_per_shard=2)
    stem = [*range(40)]
    requests = [make_request(i, [*stem, 100 + i], 3) for i in range(6)]
    run(core, requests[:1])
    before = core.stats.prefill_tokens
    run(core, requests[1:])
    assert before == 41 and core.stats.prefill_tokens - before == 5  # one token each: 40 are cached
    assert [r.output_token_ids for r in requests] == [expected(r) for r in requests]


def test_other_salts_share_nothing():
    core = make_core(page_size=4, max_num_batched_tokens=64)
    requests = [make_request(i, [*range(41)], 3) for i in range(3)]
    requests[2].cache_salt = b"another tenant"
    for request in requests:
        run(core, [request])
    assert core.stats.prefill_tokens == 41 + 1 + 41


@pytest.mark.parametrize("num_shards", [1, 2])
def test_many_short_prompts_in_a_step_equal_solo(num_shards: int):
    """More slots than a step has chunks, pages for a third of what they could need, and a budget for all."""
    slots = 2 * MAX_CHUNKS
    core = make_core(
        num_shards=num_shards,
        slots_per_shard=slots,
        pages_per_shard=1 + LONGEST // 4 * slots // 3,
        max_num_batched_tokens=LONGEST * slots,
        min_chunk=4,
    )
    rng = random.Random(num_shards)
    stem = [rng.randrange(VOCAB_SIZE) for _ in range(LONGEST)]
    plans, schedule = [], core.scheduler.schedule
    core.scheduler.schedule = lambda: plans.append(schedule()) or plans[-1]
    requests = [random_request(rng, number, LONGEST, stem) for number in range(NUM_STEPS // 8)]
    run(core, requests)
    assert [request.output_token_ids for request in requests] == [*map(expected, requests)]
    num_chunks = [len(chunks) for plan in plans if plan is not None for chunks in plan.chunks]
    assert max(num_chunks) == MAX_CHUNKS and core.scheduler.num_preemptions > 0
