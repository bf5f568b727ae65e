"""On an NVIDIA GPU: the demonstration model writes what it writes on the CPU.

    JAXINFER_TEST_PLATFORM=cuda pytest -m gpu

The CPU's side is computed in a process of its own, because this one has GPUs only.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxinfer import Engine, SamplingParams

PROMPTS = ["Once upon a time", "The old king", "In the middle of the forest"]
NUM_TOKENS = 48

pytestmark = pytest.mark.gpu


def write_on_cpu(directory: pathlib.Path) -> list[list[int]]:
    """Greedy tokens of the demonstration model in float32, through the command line."""
    prompts, outputs = directory / "prompts.txt", directory / "outputs.jsonl"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    command = [sys.executable, "-m", "jaxinfer.run_inference", "--allow_cpu", f"--max_tokens={NUM_TOKENS}"]
    command += ["--temperature=0", f"--prompts_file={prompts}", f"--output_file={outputs}"]
    subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True, timeout=300)
    return [json.loads(line)["token_ids"] for line in outputs.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    return write_on_cpu(tmp_path_factory.mktemp("cpu"))


def test_float32_writes_the_tokens_of_the_cpu(expected: list[list[int]]):
    with Engine(dtype="float32") as engine:
        assert engine.resolved.definition.partitioner.device.platform == "gpu"
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS))
    assert [o.outputs[0].token_ids for o in outputs] == expected


def test_bfloat16_is_the_default_and_starts_alike(expected: list[list[int]]):
    """Rounding may turn a close choice, after which the texts part; the first token of each is not close."""
    with Engine() as engine:
        assert engine.resolved.cache_spec.dtype == "bfloat16"
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS))
    tokens = [o.outputs[0].token_ids for o in outputs]
    assert [t[0] for t in tokens] == [t[0] for t in expected]
    assert all(
        len(t) == NUM_TOKENS or o.outputs[0].finish_reason == "stop" for t, o in zip(tokens, outputs, strict=True)
    )
