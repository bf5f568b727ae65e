"""A process of a job that runs `load` on mesh after mesh, and prints what came of it: a line of JSON per mesh.

python -m tests.distributed_worker MODEL MESH;MESH... ADDRESS COUNT INDEX
"""

import hashlib
import json
import sys
from typing import Any

import jax
import numpy as np

from jaxinfer import Engine, SamplingParams, distributed
from jaxinfer.batch import StepBatch, StepShape
from jaxinfer.cli_output import give_stdout_to_text
from jaxinfer.extras import Extras
from jaxinfer.runner import Runner
from jaxinfer.steps import StepOutput
from tests import tiny_model

PROMPTS = [[*b"Once upon a time there was"], [*b"a"], [*range(40)], [*b"the old king"], [*b"Once upon a time there is"]]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, top_k=20, seed=1, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=0.8, seed=2, max_tokens=15, ignore_eos=True, presence_penalty=1.5, n=2),
    SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True, bad_words=("e",)),
]


class DispatchDigest:
    """Of everything that this process' runners are given from now on."""

    def __init__(self):
        self.num_steps = 0
        self._sha256 = hashlib.sha256()
        noted, dispatch = self, Runner.dispatch

        def note_and_dispatch(
            self: Runner, shape: StepShape, batch: StepBatch, extras: Extras | None = None
        ) -> StepOutput:
            noted.num_steps += 1
            noted._sha256.update(repr((shape, jax.tree.structure((batch, extras)))).encode())
            for array in map(np.asarray, jax.tree.leaves((batch, extras))):
                noted._sha256.update(repr((array.dtype.name, array.shape)).encode() + array.tobytes())
            return dispatch(self, shape, batch, extras)

        Runner.dispatch = note_and_dispatch

    def __str__(self) -> str:
        return self._sha256.hexdigest()


def load(engine: Engine) -> list[list[list[int]]]:
    """The tokens of every output."""
    outputs = engine.generate(PROMPTS, PARAMS)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def fail_once(engine: Engine) -> None:
    """A bug on the host in the middle of a run: requests end, the cache is made again, in all processes."""
    scheduler, commit = engine._core.scheduler, engine._core.scheduler.commit

    def fail(*_: Any) -> None:
        scheduler.commit = commit
        raise ZeroDivisionError

    scheduler.commit = fail  # pyright: ignore[reportAttributeAccessIssue]
    try:
        load(engine)
    except ZeroDivisionError:
        return
    raise AssertionError("nothing failed")


def main(model: str, meshes: str, address: str, count: str, index: str) -> None:
    give_stdout_to_text()
    group = distributed.initialize(address, int(count), int(index), heartbeat_timeout_s=10)
    assert group is not None
    digest = DispatchDigest()
    for mesh in meshes.split(";"):
        tokens = None
        with Engine(model, mesh=mesh, **tiny_model.SIZES) as engine:
            if group.leads:
                fail_once(engine)
                tokens = load(engine)
            else:
                engine.follow()
        result = {"mesh": mesh, "tokens": tokens, "digest": str(digest), "num_steps": digest.num_steps}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
