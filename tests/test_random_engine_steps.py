"""Random loads on a real model: arrivals, aborts, forced preemption, pages that hold NaN once they are free.

Every output must be that of its request alone, whatever ran beside it. The long campaign:

    JAXINFER_TEST_STEPS=10000 pytest tests/test_random_engine_steps.py -s
"""

import os
import pathlib
import random

import jax
import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.engine_core import EngineCore
from jaxinfer.request import Request
from tests import tiny_model
from tests.campaign import campaign, report
from tests.fresh_core import fresh_core

NUM_STEPS = int(os.environ.get("JAXINFER_TEST_STEPS", "600"))  # over all combinations
LONGEST, SLOTS = 64, 4  # tokens of prompt and output; sequences that run together
CHUNKS = (1, 7, 64)
COMBINATIONS = [(chunk, prefix, preempt) for chunk in CHUNKS for prefix in (False, True) for preempt in (0, 3)]
NUM_SCRIPTS = 30  # different requests; each comes again and again

Script = tuple[list[int], SamplingParams]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


def make_engine(model_dir: pathlib.Path, page_size: int) -> Engine:
    sizes = {"max_num_seqs": SLOTS, "max_model_len": LONGEST, "max_num_batched_tokens": 64, "decode_steps": 4}
    return Engine(str(model_dir), page_size=page_size, **sizes)


@pytest.fixture(scope="module")
def scripts() -> list[Script]:
    """Greedy ones and ones that draw; half have a common stem; some stop at tokens that are likely to come."""
    rng = random.Random(0)
    stem = [rng.randrange(256) for _ in range(LONGEST)]
    found = []
    for i in range(NUM_SCRIPTS):
        max_tokens = rng.randint(1, LONGEST // 2)
        length = rng.randint(1, LONGEST - max_tokens)
        prompt = [rng.randrange(256) for _ in range(length)]
        if i % 2:
            prompt = (stem[: length - 1] + prompt)[:length]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            top_k=rng.choice([0, 20]),
            top_p=rng.choice([1.0, 0.9]),
            seed=i,
            max_tokens=max_tokens,
            stop_token_ids=rng.sample(range(256), rng.choice([0, 15])),
            ignore_eos=True,
        )
        found.append((prompt, params))
    return found


@pytest.fixture(scope="module")
def solo(model_dir: pathlib.Path, scripts: list[Script]) -> list[list[int]]:
    """Tokens of each script when nothing else runs and nothing is cached."""
    with make_engine(model_dir, page_size=4) as engine:
        engine._core.scheduler.enable_prefix_caching = False
        return [engine.generate(prompt, params)[0].outputs[0].token_ids for prompt, params in scripts]


def poison_free_pages(core: EngineCore) -> None:
    """NaN into the scratch page and every page whose content nobody may use again."""
    runner, (free,) = core.runner, core.scheduler.allocators[0]._free  # on one device
    pages = np.zeros(core.scheduler.allocators[0].num_usable_pages, np.int32)
    pages[: len(free)] = free
    runner._cache = _poison(runner._cache, pages)


@jax.jit
def _poison(cache, pages):
    return jax.tree.map(lambda array: array.at[pages].set(np.nan), cache)


@pytest.mark.parametrize("page_size", [1, 16])
def test_random_engine_steps_equal_solo(
    page_size: int, model_dir: pathlib.Path, scripts: list[Script], solo: list[list[int]]
):
    totals: dict[str, int] = {}
    with make_engine(model_dir, page_size) as engine:
        for chunk, prefix, preempt_every in COMBINATIONS:
            pages = 1 + LONGEST * 3 // 2 // page_size  # of a sequence and a half
            core = fresh_core(engine, chunk=chunk, prefix=prefix, decode_steps=4, pages_per_shard=pages)
            rng = random.Random(f"{page_size} {chunk} {preempt_every}")
            drawn: dict[Request, int] = {}

            def make(number: int, drawn=drawn, rng=rng) -> Request:
                script = rng.randrange(NUM_SCRIPTS)
                (request,) = engine._intake.make_requests(*scripts[script])
                drawn[request] = script
                return request

            requests = campaign(
                core,
                rng,
                NUM_STEPS // len(COMBINATIONS) // 2,
                make,
                preempt_every=preempt_every,
                after_step=lambda core=core: poison_free_pages(core),
            )
            result = report(core, requests, lambda request, drawn=drawn: solo[drawn[request]])
            assert result["mismatching requests"] == 0 and result["leaked pages"] == 0, (chunk, prefix, preempt_every)
            assert result["errors"] == 0, "somebody read a free page"
            totals = {name: totals.get(name, 0) + count for name, count in result.items()}
    print(f"page size {page_size}: {totals}")
    assert totals["finished"] > 0 and totals["preemptions"] > 0
