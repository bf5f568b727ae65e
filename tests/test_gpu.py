"""On an NVIDIA GPU: the demonstration model writes what it writes on the CPU, and kernels compute what XLA does.

    JAXINFER_TEST_PLATFORM=cuda pytest -m gpu

The CPU's side is computed in a process of its own, because this one has GPUs only.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.integers import cdiv
from pallas_kernels.paged_attention import backend, backends
from tests.test_kernels_for_gpus import SPECS

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


@pytest.mark.parametrize("model", SPECS)
@pytest.mark.parametrize("name", [name for name in backends() if name != "xla"])
def test_kernels_at_real_sizes_agree_with_xla_in_float32(name: str, model: str):
    """With the settings that serve; the numbers of both are the same bfloat16 ones. Pages of nobody hold NaN."""
    spec = dataclasses.replace(SPECS[model], dtype="bfloat16")
    if reason := backend(name).unsupported(spec, jax.devices()[0]):
        pytest.skip(reason)
    lengths, asked = [0, 1, spec.page_size, spec.page_size + 1, 777, 5000], [0, 1, 1, 40, 130, 300]
    rng, pages = np.random.default_rng(0), [cdiv(length, spec.page_size) for length in lengths]
    order, tables = iter(rng.permutation(np.arange(1, sum(pages) + 4))), np.zeros((len(pages), max(pages)), np.int32)
    for row, count in enumerate(pages):
        tables[row, :count] = [next(order) for _ in range(count)]
    unused = np.setdiff1d(np.arange(sum(pages) + 4), tables[tables > 0])
    shape = (sum(pages) + 4, spec.num_kv_heads, spec.page_size, spec.head_dim)
    pools = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16).at[unused].set(jnp.nan) for i in range(2)]
    keys_and_values = (pools[0], None if spec.value_dim else pools[1])
    num_tokens = sum(asked) + 5
    q = jax.random.normal(jax.random.key(2), (num_tokens, spec.num_q_heads, spec.head_dim), jnp.bfloat16)
    ends, new = np.array(lengths, np.int32), np.array(asked, np.int32)
    rows = (q[: len(lengths), None], *keys_and_values, tables, ends[:, None] - 1)
    prompts = (q, *keys_and_values, tables, ends - new, new)
    # Of prompts' tokens those that are padding count for nothing.
    for function, arguments, count in (
        ("paged_attention", rows, len(lengths)),
        ("ragged_paged_attention", prompts, sum(asked)),
    ):
        ours, theirs = (jax.jit(functools.partial(getattr(backend(n), function), spec=spec)) for n in (name, "xla"))
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
        out, expected = np.asarray(ours(*arguments), np.float64), np.asarray(theirs(*wide), np.float64)
        np.testing.assert_allclose(out[:count], expected[:count], rtol=2e-2, atol=2e-3 * np.abs(expected).max())
