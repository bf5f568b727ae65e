"""The asyncio engine on a tiny random model: text as from the plain engine, and nothing left behind."""

import asyncio
import pathlib
import random

import pytest

from jaxinfer import AsyncEngine, Engine, SamplingParams
from tests import tiny_model
from tests.fake_runner import assert_empty

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
TEXTS = [f"Once upon a time {i} there was" * (1 + i % 4) for i in range(12)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    with Engine(str(tiny_model.make(directory)), max_num_seqs=4, max_num_batched_tokens=32, decode_steps=4) as engine:
        yield engine


def test_streams_beside_each_other_equal_the_plain_engine(engine: Engine):
    """And afterwards the engine is its owner's again."""
    expected = [output.outputs[0] for output in engine.generate(TEXTS, GREEDY)]

    async def read(stream) -> tuple[str, list[int]]:
        deltas = [delta async for delta in stream]
        return "".join(delta.text for delta in deltas), [t for delta in deltas for t in delta.token_ids]

    async def main() -> None:
        async with asyncio.timeout(120), AsyncEngine.from_engine(engine) as async_engine:
            streams = [async_engine.stream(text, GREEDY) for text in TEXTS[::2]]
            whole = asyncio.gather(*(async_engine.generate(text, GREEDY) for text in TEXTS[1::2]))
            assert await asyncio.gather(*map(read, streams)) == [(o.text, o.token_ids) for o in expected[::2]]
            outputs = await whole
            assert [o.outputs[0] for o in outputs] == expected[1::2]
            assert [o.prompt for o in outputs] == TEXTS[1::2]
            default = await async_engine.generate(TEXTS[0])
            assert len(default.outputs[0].token_ids) <= engine.default_sampling_params.max_tokens

    before = engine.metrics().num_compilations_after_ready
    asyncio.run(main())
    assert engine.metrics().num_compilations_after_ready == before
    assert [output.outputs[0] for output in engine.generate(TEXTS, GREEDY)] == expected


def test_several_outputs_and_logprobs_equal_the_plain_engine(engine: Engine):
    params = SamplingParams(n=3, seed=5, max_tokens=9, logprobs=2, prompt_logprobs=1)
    expected = engine.generate(TEXTS[1], params)[0]

    def values(entries) -> dict[tuple[int, int], float]:
        return {(i, token): logprob.logprob for i, entry in enumerate(entries) for token, logprob in entry.items()}

    async def main() -> None:
        async with asyncio.timeout(120), AsyncEngine.from_engine(engine) as async_engine:
            whole = asyncio.create_task(async_engine.generate(TEXTS[1], params))
            deltas = [delta async for delta in async_engine.stream(TEXTS[1], params)]
            for output in expected.outputs:
                own = [delta for delta in deltas if delta.index == output.index]
                assert [t for delta in own for t in delta.token_ids] == output.token_ids
                logprobs = values([entry for delta in own for entry in delta.logprobs or ()])
                assert logprobs == pytest.approx(values(output.logprobs), abs=1e-4)
                assert [delta.finish_reason for delta in own if delta.finish_reason] == [output.finish_reason]
            outputs = (await whole).outputs
            assert [(o.index, o.token_ids, o.text) for o in outputs] == [
                (o.index, o.token_ids, o.text) for o in expected.outputs
            ]
            prompt_logprobs = (await whole).prompt_logprobs
            assert prompt_logprobs is not None and expected.prompt_logprobs is not None
            assert values(prompt_logprobs[1:]) == pytest.approx(values(expected.prompt_logprobs[1:]), abs=1e-4)

    asyncio.run(main())
    assert len({tuple(output.token_ids) for output in expected.outputs}) == 3, "three draws"


def test_fifty_cancellations_leave_nothing(engine: Engine):
    expected = [output.outputs[0] for output in engine.generate(TEXTS, GREEDY)]
    rng = random.Random(0)

    async def main() -> None:
        async with asyncio.timeout(120), AsyncEngine.from_engine(engine) as async_engine:

            async def stream(text: str) -> None:
                async for _ in async_engine.stream(text, GREEDY):
                    pass

            stay = [asyncio.create_task(async_engine.generate(text, GREEDY)) for text in TEXTS]
            for i in range(50):
                way = (stream, async_engine.generate)[i % 2]
                task = asyncio.create_task(way(rng.choice(TEXTS)))
                await asyncio.sleep(rng.random() * 0.02)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            assert [(await task).outputs[0] for task in stay] == expected

    aborted = engine.metrics().finished["abort"]
    asyncio.run(main())
    assert engine.metrics().finished["abort"] - aborted > 10
    assert_empty(engine._core)


def test_an_engine_that_it_made_is_closed_with_it(tmp_path: pathlib.Path):
    model_dir = str(tiny_model.make(tmp_path / "tiny"))

    async def main() -> None:
        async with AsyncEngine(model_dir, **tiny_model.ONE_SLOT) as async_engine:
            await async_engine.generate("abc", GREEDY)
        with pytest.raises(RuntimeError, match="the engine is closed"):
            async_engine.engine.generate("abc", GREEDY)

    asyncio.run(main())
    with pytest.raises(ValueError, match="max_waiting=0"):
        AsyncEngine("nowhere", max_waiting=0)
