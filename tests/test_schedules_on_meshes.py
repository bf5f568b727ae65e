"""Every way to schedule on meshes without a pipeline gives the tokens of one request alone on one device.

One set of programs per mesh; the schedulers are swapped over it.
"""

import itertools
import pathlib
import random

import pytest

from jaxinfer import Engine, SamplingParams, batch
from jaxinfer.engine_core import step_result
from jaxinfer.request import Request
from tests import tiny_model
from tests.fresh_core import fresh_core
from tests.long_campaign import IS_LONG, chosen

EVERY_AXIS = "data:2,context:2,tensor:2"
MESHES = chosen(("", "tensor:2", "data:2", "data:2,tensor:2", "context:8", EVERY_AXIS), "", EVERY_AXIS)
COMBINATIONS = [
    {"chunk": chunk, "prefix": prefix, "starved": starved, "overlap": overlap, "decode_steps": decode_steps}
    for chunk, prefix, starved, overlap, decode_steps in itertools.product(
        (7, 32), (False, True), (False, True), (False, True), (1, 4)
    )
]
PAIRWISE = [  # any two choices in all four ways, in a quarter of the runs
    {**of, "overlap": (of["chunk"] == 7) ^ of["prefix"], "decode_steps": 4 if (of["chunk"] == 7) ^ of["starved"] else 1}
    for of in COMBINATIONS
    if not of["overlap"] and of["decode_steps"] == 1
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


def make_engine(model_dir: pathlib.Path, mesh: str) -> Engine:
    return Engine(str(model_dir), mesh=mesh, **tiny_model.SIZES)


def load(engine: Engine) -> list[Request]:
    """Twelve requests, half of which start alike; greedy rows beside rows that draw and truncate."""
    rng = random.Random(0)
    stem = [rng.randrange(256) for _ in range(24)]
    requests = []
    for i in range(12):
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 40))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.8]),
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.9]),
            seed=i,
            max_tokens=rng.randint(1, 20),
            ignore_eos=True,
        )
        requests += engine._intake.make_requests((stem + prompt)[:40] if i % 2 else prompt, params)
    return requests


@pytest.fixture(scope="module")
def expected(model_dir: pathlib.Path) -> list[list[int]]:
    with make_engine(model_dir, "") as engine:
        engine._core.scheduler.enable_prefix_caching = False
        return [
            engine.generate(request.prompt_token_ids, request.params)[0].outputs[0].token_ids
            for request in load(engine)
        ]


def run(
    engine: Engine, *, chunk: int, prefix: bool, starved: bool, overlap: bool, decode_steps: int
) -> tuple[list[list[int]], int]:
    """Tokens of `load`, and preemptions, by a new scheduler over the engine's programs."""
    pages = 1 + engine.resolved.max_model_len // 4 if starved else None
    core = fresh_core(engine, chunk=chunk, prefix=prefix, decode_steps=decode_steps, pages_per_shard=pages)
    runner, scheduler = core.runner, core.scheduler
    requests = load(engine)
    for request in requests:
        scheduler.add(request)
    if overlap:
        while core.has_work:
            core.step()
            scheduler.check()
    else:
        while (plan := scheduler.schedule()) is not None:
            shape = runner.buckets.shape(plan)
            of_step = batch.build(plan, shape, scheduler.table)
            scheduler.commit(plan, step_result(plan, shape, of_step, runner.dispatch(shape, of_step)), [])
            scheduler.check()
    return [request.output_token_ids for request in requests], scheduler.num_preemptions


@pytest.mark.parametrize("mesh", MESHES)
def test_schedules_equal_solo(mesh: str, model_dir: pathlib.Path, expected: list[list[int]]):
    with make_engine(model_dir, mesh) as engine:
        num_preemptions = {False: 0, True: 0}
        combinations = PAIRWISE if mesh and not IS_LONG else COMBINATIONS
        for combination in combinations:
            tokens, count = run(engine, **combination)
            assert tokens == expected, combination
            num_preemptions[combination["starved"]] += count
    print(f"{mesh or 'one device'}: {len(combinations)} combinations, preemptions {num_preemptions[True]}")
    assert num_preemptions[True] > 0 and num_preemptions[False] == 0
