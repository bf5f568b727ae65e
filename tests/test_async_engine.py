"""The asyncio engine on the fake runner: every way to come and to leave, and every way to end."""

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from jaxinfer.async_engine import AsyncEngine, EngineOverloadedError
from jaxinfer.engine import Engine
from jaxinfer.engine_core import EngineDeadError
from jaxinfer.request import Request, SamplingParams
from jaxinfer.request_stream import RequestStream
from tests.fake_runner import FakeRunner, assert_empty, make_engine, solo


def tokens(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count)


def run(body: Callable[[AsyncEngine], Coroutine], engine: Engine | None = None, **settings: Any) -> None:
    """Runs `body` with an engine, which must be empty in the end; what hangs fails."""
    engine, problems = engine or make_engine(), []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        async with asyncio.timeout(60), AsyncEngine.from_engine(engine, **settings) as async_engine:
            await body(async_engine)

    asyncio.run(main())
    assert not problems
    assert not [t for t in threading.enumerate() if t.name == "jaxinfer-engine"]
    assert_empty(engine._core)


def runner_of(engine: Engine) -> FakeRunner:
    assert isinstance(engine._core.runner, FakeRunner)
    return engine._core.runner


def before_each_step(engine: Engine, call: Callable[[], object]) -> None:
    """Calls `call` in the engine's thread before a step is started."""
    runner = runner_of(engine)
    dispatch = runner.dispatch

    def slower(*of_step):
        call()
        return dispatch(*of_step)

    runner.dispatch = slower  # pyright: ignore[reportAttributeAccessIssue]


def gated(engine: Engine) -> threading.Event:
    """No step is started until the event is set; or for ten seconds, lest a test that fails hang."""
    gate = threading.Event()
    before_each_step(engine, lambda: gate.wait(10))
    return gate


def stepped(engine: Engine) -> threading.Semaphore:
    """A step is started for each permit that the semaphore gets; or after ten seconds, lest a test that fails hang."""
    permits = threading.Semaphore(0)
    before_each_step(engine, lambda: permits.acquire(timeout=10))
    return permits


async def read(stream: RequestStream) -> tuple[list[int], str | None]:
    """All of its tokens, and why it ended."""
    token_ids, reason = [], None
    async for delta in stream:
        assert reason is None, "nothing comes after the end"
        assert delta.token_ids or delta.finish_reason, "an empty delta"
        token_ids += delta.token_ids
        reason = delta.finish_reason
    return token_ids, reason


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def all_are_queued(engine: AsyncEngine) -> bool:
    """Whether the prompts have come through the intake thread."""
    return all(live.requests for live in engine._live.values())


@pytest.mark.parametrize("decode_steps", [1, 4])
def test_interleaved_streams_equal_solo_outputs(decode_steps: int):
    """A pool that is too small, so that requests are preempted as well."""
    engine = make_engine(slots_per_shard=4, pages_per_shard=25, decode_steps=decode_steps)

    async def body(async_engine: AsyncEngine) -> None:
        prompts = [[i % 7] * (1 + i % 30) for i in range(60)]
        streams = [async_engine.stream(p, tokens(1 + i % 25)) for i, p in enumerate(prompts)]
        outputs = await asyncio.gather(*map(read, streams))
        assert outputs == [(solo(p, 1 + i % 25), "length") for i, p in enumerate(prompts)]
        whole = await asyncio.gather(*(async_engine.generate(p, tokens(9)) for p in prompts))
        assert [o.outputs[0].token_ids for o in whole] == [solo(p, 9) for p in prompts]
        assert [o.prompt_token_ids for o in whole] == prompts

    run(body, engine)
    assert engine.metrics().num_preemptions > 0


def test_a_stream_after_its_end_gives_the_whole_output():
    async def body(engine: AsyncEngine) -> None:
        stream = engine.stream([1, 2, 3], tokens(9), request_id="mine")
        token_ids, _ = await read(stream)
        output = await stream.output()
        assert output.outputs[0].token_ids == token_ids and output.request_id == stream.request_id == "mine"
        assert output.metrics.tpot_s is not None
        assert await read(stream) == ([], None)

    run(body)


def test_lower_priorities_run_first():
    engine = make_engine(slots_per_shard=1)
    gate = gated(engine)
    order: list[int] = []

    async def body(async_engine: AsyncEngine) -> None:
        async def generate(priority: int) -> None:
            await async_engine.generate([1], tokens(20), priority=priority)
            order.append(priority)

        tasks = [asyncio.create_task(generate(priority)) for priority in (-9, 1, 0, -1)]
        await until(lambda: len(async_engine._live) == 4 and all_are_queued(async_engine))
        gate.set()
        await asyncio.gather(*tasks)

    run(body, engine)
    assert order == [-9, -1, 0, 1]


def test_a_thousand_cancellations_at_random_times_leak_nothing():
    """Every way to leave, and some that stay; what stays is as if it were alone."""
    engine, rng = make_engine(pages_per_shard=25, num_shards=2), random.Random(0)
    ways = ["cancel stream", "cancel generate", "break", "close", "drop", "abort", "stay"]
    left = dict.fromkeys(ways, 0)
    before_each_step(engine, lambda: time.sleep(rng.random() * 2e-4))

    async def one(async_engine: AsyncEngine, number: int) -> None:
        way, prompt, count = rng.choice(ways), [rng.randrange(9)] * rng.randint(1, 40), rng.randint(1, 20)
        num_read = rng.randint(0, 4)
        left[way] += 1
        if way == "cancel generate":
            task = asyncio.create_task(async_engine.generate(prompt, tokens(count)))
            await asyncio.sleep(rng.random() * 0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return
        stream = async_engine.stream(prompt, tokens(count), request_id=f"{number}")
        if way == "stay":
            assert await read(stream) == (solo(prompt, count), "length")
        elif way == "cancel stream":
            task = asyncio.create_task(read(stream))
            await asyncio.sleep(rng.random() * 0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        elif way == "abort":
            await asyncio.sleep(rng.random() * 0.01)
            await async_engine.abort(stream.request_id)
            token_ids, reason = await read(stream)
            assert reason in ("abort", "length") and token_ids == solo(prompt, count)[: len(token_ids)]
        elif way != "drop":
            async for _ in stream:
                num_read -= 1
                if num_read < 0:
                    break
            if way == "close":
                await stream.aclose()

    async def body(async_engine: AsyncEngine) -> None:
        number = 0
        while sum(left.values()) - left["stay"] < 1000:
            batch = range(number, number + 40)
            await asyncio.gather(*(one(async_engine, i) for i in batch))
            number = batch.stop
        await until(lambda: not async_engine._live)
        assert_empty(engine._core)

    run(body, engine)
    finished = engine.metrics().finished
    print(left, dict(finished), f"{engine._core.stats.steps} steps")
    assert min(left.values()) > 100 and finished["abort"] > 300 and finished["length"] >= left["stay"]
    assert sum(finished.values()) == sum(left.values())


def long_engine(slots_per_shard: int = 4) -> Engine:
    """For requests that do not end by themselves while a test runs: ten milliseconds a token, ENDLESS tokens."""
    engine = make_engine(max_model_len=2**16, pages_per_shard=2**14, decode_steps=1, slots_per_shard=slots_per_shard)
    before_each_step(engine, lambda: time.sleep(1e-2))
    return engine


ENDLESS = tokens(60_000)


@pytest.mark.parametrize("way", ["cancel stream", "cancel generate", "break", "close", "drop", "abort"])
def test_a_request_that_is_left_is_gone_within_two_steps(way: str):
    """Under way are the step that was started before, and the one that the thread is at."""
    engine = make_engine()
    permits = stepped(engine)

    async def body(async_engine: AsyncEngine) -> None:
        async def read_one(stream: RequestStream) -> None:
            async for _ in stream:
                break

        names = [str(i) for i in range(4)]
        streams: list[RequestStream] = []
        tasks: list[asyncio.Task] = []
        if way == "cancel generate":
            tasks = [asyncio.create_task(async_engine.generate([1], tokens(60))) for _ in names]
        else:
            streams = [async_engine.stream([1], tokens(60), request_id=name) for name in names]
        if way in ("cancel stream", "break"):
            tasks = [asyncio.create_task((read if way == "cancel stream" else read_one)(s)) for s in streams]
        await until(lambda: len(async_engine._live) == 4 and all_are_queued(async_engine))
        permits.release(6)
        await until(lambda: engine._core.stats.steps == 5)  # the sixth is read when the seventh has been started
        assert engine.metrics().num_running == 4
        match way:
            case "cancel stream" | "cancel generate":
                for task in tasks:
                    task.cancel()
            case "close":
                for stream in streams:
                    await stream.aclose()
                    assert await read(stream) == ([], None)
            case "abort":
                tasks = [asyncio.create_task(async_engine.abort(name)) for name in names]
                await asyncio.sleep(0)
        if way != "abort":
            await asyncio.gather(*tasks, return_exceptions=True)
        streams.clear()
        permits.release(1)
        await until(lambda: not engine.metrics().num_running)
        await asyncio.gather(*tasks, return_exceptions=True)

    start = time.monotonic()
    run(body, engine)
    assert engine.metrics().finished["abort"] == 4 and engine._core.stats.steps <= 7
    assert time.monotonic() - start < 10, "a step more was started, by a permit that nobody gave"


def test_a_stream_that_nobody_reads_is_ended_when_it_is_dropped():
    """By the garbage collector, too, which may run in the engine's own thread."""
    engine = make_engine()
    before_each_step(engine, gc.collect)

    async def body(async_engine: AsyncEngine) -> None:
        for _ in range(5):
            stream: Any = async_engine.stream([1], tokens(60))
            cycle = [stream]
            cycle.append(cycle)
            del stream, cycle
        await until(lambda: not async_engine._live)

    run(body, engine)
    assert engine.metrics().finished["abort"] == 5


def test_a_slow_reader_gets_longer_deltas_and_holds_up_nobody():
    engine = make_engine(decode_steps=1)
    permits = stepped(engine)

    async def body(async_engine: AsyncEngine) -> None:
        permits.release(9)
        slow = async_engine.stream([1], tokens(50))
        fast = [async_engine.stream([2 + i], tokens(50)) for i in range(9)]
        first = await anext(slow)
        permits.release(1000)
        assert [len(token_ids) for token_ids, _ in await asyncio.gather(*map(read, fast))] == [50] * 9
        rest = await anext(slow)
        assert first.token_ids + rest.token_ids == solo([1], 50) and rest.finish_reason == "length"

    run(body, engine)


def test_a_loop_that_is_held_up_is_woken_once():
    """Not once per step, or what waits for it grows as long as it is held up."""
    engine = make_engine(decode_steps=1)
    calls = []

    async def body(async_engine: AsyncEngine) -> None:
        loop = asyncio.get_running_loop()
        call_soon = loop.call_soon_threadsafe
        stream = async_engine.stream([1], tokens(60))
        await anext(stream)
        loop.call_soon_threadsafe = lambda *args: calls.append(args) or call_soon(*args)  # pyright: ignore
        while not engine.metrics().finished["length"]:
            time.sleep(0.001)
        assert len(calls) <= 1
        await read(stream)

    before_each_step(engine, lambda: time.sleep(1e-3))
    run(body, engine)
    assert engine._core.stats.steps > 50


def test_more_requests_than_may_wait_are_refused():
    engine = make_engine(slots_per_shard=2)
    gate = gated(engine)

    async def body(async_engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(async_engine.generate([1], tokens(5)))]
        await until(lambda: engine.metrics().num_running)
        streams: list[RequestStream] = []
        with pytest.raises(EngineOverloadedError, match="3 requests wait and max_waiting=3; try later"):
            streams.extend(async_engine.stream([7], tokens(5)) for _ in range(9))
        assert len(streams) == 3
        gate.set()
        await asyncio.gather(*tasks, *map(read, streams))
        await async_engine.generate([1], tokens(5))

    run(body, engine, max_waiting=3)
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"max_waiting={wrong}: must be an integer of at least 1"):
            AsyncEngine.from_engine(engine, max_waiting=wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("prompt", "priority", "message"),
    [
        ("text", 0, "the model has no tokenizer"),
        ([], 0, "the prompt is empty"),
        ([1], 0.5, "priority=0.5: must be an integer"),
        ([1] * 50, 0, "needs 15 cache pages and the pool has 8"),
    ],
)
def test_what_cannot_run_is_refused_to_whoever_asked(prompt, priority, message: str):
    async def body(engine: AsyncEngine) -> None:
        good = asyncio.create_task(engine.generate([1], tokens(9)))
        with pytest.raises(ValueError, match=message):
            await engine.generate(prompt, tokens(9), priority=priority)
        with pytest.raises(ValueError, match=message):
            await read(engine.stream(prompt, tokens(9), priority=priority))
        engine.stream(prompt, tokens(9), priority=priority)  # and nobody listens
        assert (await good).outputs[0].token_ids == solo([1], 9)
        await until(lambda: not engine._live)

    run(body, make_engine(pages_per_shard=9))


def test_an_id_is_one_requests_at_a_time():
    async def body(engine: AsyncEngine) -> None:
        first = engine.stream([1], ENDLESS, request_id="request-0")
        with pytest.raises(ValueError, match="request_id='request-0': an unfinished request has this id"):
            engine.stream([2], tokens(5), request_id="request-0")
        assert engine.stream([2], tokens(5)).request_id == "request-1"
        await engine.abort("request-0")
        await engine.abort("request-0")
        second = engine.stream([2], tokens(5), request_id="request-0")
        engine._wake(first._live)  # as it happens to one that ended between two steps' wake-ups
        assert engine._live["request-0"] is second._live
        assert await read(second) == (solo([2], 5), "length")
        assert (await read(first))[1] == "abort"

    run(body, long_engine())


def test_a_request_is_aborted_while_its_prompt_is_being_encoded():
    """And its time counts from the call, not from when it had been encoded."""
    engine = make_engine()
    make_requests = engine._make_requests

    def slower(*args: Any) -> list[Request]:
        time.sleep(0.05)
        return make_requests(*args)

    engine._make_requests = slower  # pyright: ignore[reportAttributeAccessIssue]

    async def body(async_engine: AsyncEngine) -> None:
        stream = async_engine.stream([1], tokens(9))
        await async_engine.abort(stream.request_id)
        assert await read(stream) == ([], "abort")
        output = await async_engine.generate([1], tokens(9))
        assert output.metrics.queue_s is not None and output.metrics.queue_s > 0.05

    run(body, engine)


@pytest.mark.parametrize("at", ["dispatch", "read"])
def test_a_step_that_fails_ends_what_ran_and_nothing_else(at: str):
    """Also while the step after it fails: who ended must be told, though no step returns."""
    engine = make_engine(slots_per_shard=2)
    gate = gated(engine)

    async def body(async_engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(read(async_engine.stream([i], tokens(9)))) for i in range(6)]
        await until(lambda: len(async_engine._live) == 6 and all_are_queued(async_engine))
        runner_of(engine).fail_at = at
        gate.set()
        outputs = await asyncio.gather(*tasks)
        reasons = [reason for _, reason in outputs]
        assert 1 <= reasons.count("error") <= 2 and reasons.count("length") == 6 - reasons.count("error")
        assert all(ids == solo([i], 9) for i, (ids, reason) in enumerate(outputs) if reason == "length")
        async_engine.check_health()

    run(body, engine)


def test_who_failed_is_told_though_every_step_fails():
    engine = make_engine(slots_per_shard=1)

    def fail() -> None:
        runner_of(engine).fail_at = "dispatch"

    before_each_step(engine, fail)

    async def body(async_engine: AsyncEngine) -> None:
        for _ in range(3):
            assert (await async_engine.generate([1], tokens(9))).outputs[0].finish_reason == "error"
        async_engine.check_health()

    run(body, engine)


def fail(*_: object) -> None:
    raise RuntimeError("planted")


@pytest.mark.parametrize("what", ["schedule", "check", "reset_cache"])
def test_everybody_is_told_that_the_engine_died(what: str):
    """Of a step that nobody took part in, of books that do not add up, of a cache that cannot be made again."""
    engine = make_engine()
    gate = gated(engine)

    async def body() -> None:
        async with asyncio.timeout(60), AsyncEngine.from_engine(engine) as async_engine:
            tasks: list[asyncio.Task] = [
                asyncio.create_task(read(async_engine.stream([i], tokens(60)))) for i in range(9)
            ]
            tasks += [asyncio.create_task(async_engine.generate([i], tokens(60))) for i in range(9)]
            await asyncio.sleep(0.01)
            if what == "reset_cache":
                runner_of(engine).reset_cache = fail
                runner_of(engine).fail_at = "read"
            elif what == "schedule":
                engine._core.scheduler.schedule = fail  # pyright: ignore[reportAttributeAccessIssue]
            else:
                engine._core.scheduler.check = fail
            gate.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results if what == "reset_cache" else []:
                assert isinstance(result, EngineDeadError) and "planted" in str(result)
            await until(lambda: async_engine._death)
            for call in (
                lambda: async_engine.generate([1], tokens(5)),
                lambda: async_engine.abort("any"),
                lambda: read(async_engine.stream([1])),
            ):
                with pytest.raises(EngineDeadError, match=r"the engine has died, make a new one: .*planted") as caught:
                    await call()
                assert caught.value.__cause__ is async_engine._death
            with pytest.raises(EngineDeadError):
                async_engine.check_health()
            assert not async_engine._live
            async_engine.metrics()

    asyncio.run(body())
    assert not [t for t in threading.enumerate() if t.name == "jaxinfer-engine"]


@pytest.mark.parametrize("drain", [False, True])
def test_closing_with_live_streams(drain: bool):
    engine = make_engine(slots_per_shard=2) if drain else long_engine(slots_per_shard=2)

    async def body(async_engine: AsyncEngine) -> None:
        streams = [async_engine.stream([i], tokens(40) if drain else ENDLESS) for i in range(6)]
        tasks = [asyncio.create_task(read(stream)) for stream in streams[:5]]
        begun = await anext(streams[5]) if drain else None  # on a busy machine this may be all of it
        await until(lambda: drain or engine.metrics().num_running == 2)
        await asyncio.gather(async_engine.close(drain=drain), async_engine.close(drain=drain))
        outputs = [await task for task in tasks]
        assert {reason for _, reason in outputs} == {"length" if drain else "abort"}
        assert all(ids == solo([i], len(ids)) for i, (ids, _) in enumerate(outputs))
        _, reason = await read(streams[5])  # nobody has while it closed
        assert ((begun and begun.finish_reason) or reason) == ("length" if drain else "abort")
        for call in (async_engine.check_health, lambda: async_engine.stream([1])):
            with pytest.raises(RuntimeError, match="the engine is closed; make a new one"):
                call()

    run(body, engine)


def test_closing_again_ends_what_draining_waited_for():
    async def body(engine: AsyncEngine) -> None:
        stream = engine.stream([1], ENDLESS)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.close(drain=True), 0.05)
        await engine.close()
        assert (await stream.output()).outputs[0].finish_reason == "abort"

    run(body, long_engine())


def test_an_engine_belongs_to_one_loop_and_is_entered_once():
    async_engine = AsyncEngine.from_engine(make_engine())
    outside = asyncio.new_event_loop()

    async def use() -> None:
        async_engine.stream([1])

    async def main() -> None:
        with pytest.raises(RuntimeError, match="the engine is not running; use `async with"):
            async_engine.stream([1])
        async with async_engine:
            with pytest.raises(RuntimeError, match="belongs to the event loop that entered it"):
                await asyncio.to_thread(outside.run_until_complete, use())
            with pytest.raises(RuntimeError, match="belongs to the event loop that entered it"):
                await asyncio.to_thread(outside.run_until_complete, async_engine.close())
        with pytest.raises(RuntimeError, match="was entered before"):
            await async_engine.__aenter__()

    asyncio.run(main())
    outside.close()


def test_an_engine_with_requests_is_not_taken_over():
    engine = make_engine()
    request_id = engine.add_request([1], tokens(5))
    with pytest.raises(ValueError, match="the engine has unfinished requests"):
        AsyncEngine.from_engine(engine)
    engine.abort(request_id)


def test_the_thread_ends_when_its_loop_is_gone():
    """It once raised in `call_soon_threadsafe`, and again when it wanted to say so."""
    engine = make_engine()
    gate = gated(engine)
    loop, async_engine = asyncio.new_event_loop(), AsyncEngine.from_engine(engine)

    async def start() -> RequestStream:
        await async_engine.__aenter__()
        return async_engine.stream([1], tokens(60))

    stream = loop.run_until_complete(start())
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()
    gate.set()
    async_engine._thread._thread.join(10)
    assert not async_engine._thread._thread.is_alive()
    del stream


def test_an_idle_engine_sleeps():
    engine, steps = make_engine(), []
    before_each_step(engine, lambda: steps.append(0))

    async def body(async_engine: AsyncEngine) -> None:
        for _ in range(3):
            await async_engine.generate([1], tokens(3))
            await asyncio.sleep(0.02)
            num_steps, start = len(steps), time.process_time()
            await asyncio.sleep(0.3)
            assert len(steps) == num_steps and time.process_time() - start < 0.1

    run(body, engine)
