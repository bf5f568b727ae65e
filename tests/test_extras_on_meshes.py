"""Requests that use every sampling parameter: the same tokens and log-probabilities however they are scheduled."""

import itertools
import pathlib
from typing import Any

import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.request import Request
from tests import tiny_model
from tests.fresh_core import fresh_core
from tests.long_campaign import chosen
from tests.test_sampling_extras import random_load

MESHES = chosen(("", "tensor:2", "data:2", "data:2,tensor:2"), "", "data:2,tensor:2")
COMBINATIONS = [
    {"chunk": chunk, "prefix": prefix, "starved": starved, "decode_steps": 4 if prefix else 1}
    for chunk, prefix, starved in itertools.product((7, 32), (False, True), (False, True))
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


def make_engine(model_dir: pathlib.Path, mesh: str) -> Engine:
    return Engine(str(model_dir), mesh=mesh, **tiny_model.SIZES)


def load(engine: Engine) -> list[Request]:
    """Half of them start alike, and every third uses nothing special."""
    prompts, each = random_load(15)
    requests = []
    for i, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
        prompt = (prompts[0] + prompt)[:60] if i % 2 else prompt
        requests += engine._intake.make_requests(prompt, params if i % 3 else SamplingParams(seed=i, max_tokens=12))
    return requests


def run(engine: Engine, requests: list[Request], *, chunk: int, prefix: bool, starved: bool, decode_steps: int) -> int:
    """Runs them by a new scheduler over the engine's programs; the number of preemptions."""
    pages = 1 + engine.resolved.max_model_len // 4 if starved else None
    core = fresh_core(engine, chunk=chunk, prefix=prefix, decode_steps=decode_steps, pages_per_shard=pages)
    for request in requests:
        core.scheduler.add(request)
    while core.has_work:
        core.step()
        core.scheduler.check()
    return core.scheduler.num_preemptions


def logprobs(request: Request) -> dict[tuple[str, int, int], float]:
    """All that a request has, by what they are of, position and token."""
    return {
        (name, at, token_id): entry.logprob
        for name, record in (("prompt", request.prompt_logprobs), ("output", request.logprobs))
        for at, entries in enumerate(record.entries if record else ())
        for token_id, entry in entries.items()
    }


@pytest.fixture(scope="module")
def alone(model_dir: pathlib.Path) -> list[Request]:
    """Each on its own, on one device."""
    with make_engine(model_dir, "") as engine:
        requests = load(engine)
        for request in requests:
            run(engine, [request], chunk=32, prefix=False, starved=False, decode_steps=1)
        return requests


@pytest.mark.parametrize("mesh", MESHES)
def test_schedules_with_extras_equal_solo(mesh: str, model_dir: pathlib.Path, alone: list[Request]):
    num_preemptions = 0
    with make_engine(model_dir, mesh) as engine:
        for combination in COMBINATIONS:
            requests = load(engine)
            num_preemptions += run(engine, requests, **combination)
            for i, (request, wanted) in enumerate(zip(requests, alone, strict=True)):
                assert request.output_token_ids == wanted.output_token_ids, (combination, i, request.params)
                check_same(logprobs(request), logprobs(wanted))
    assert num_preemptions > 0


def check_same(found: dict[Any, float], wanted: dict[Any, float]) -> None:
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[key] for key in wanted], [*wanted.values()], rtol=1e-4, atol=1e-4)
