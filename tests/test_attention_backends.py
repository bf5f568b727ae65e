"""An engine writes the same tokens with every attention backend. On a CPU kernels are interpreted."""

import dataclasses
import functools
import math
import pathlib

import jax
import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.layouts import parse_mesh
from pallas_kernels.paged_attention import AttentionSpec, backend, backends
from tests import tiny_model
from tests.parity import driver

pytestmark = pytest.mark.any_device

PROMPTS = ["a", "abc" * 15, "xyzw"]
KERNELS = [name for name in backends() if name != "xla"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Heads of as many numbers as every backend takes."""
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny", head_dim=64, num_attention_heads=4)


def skip_where_it_cannot(name: str, dtype: str, page_size: int, context_size: int = 1) -> None:
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=page_size, scale=1.0, dtype=dtype)
    if reason := backend(name).unsupported(dataclasses.replace(spec, context_size=context_size), jax.devices()[0]):
        pytest.skip(reason)


def write(model_dir: pathlib.Path, name: str, mesh: str) -> list[list[int]]:
    sizes = {"mesh": mesh, "dtype": "float32", **tiny_model.SIZES}
    with Engine(str(model_dir), attention_backend=name, **sizes) as engine:
        assert engine.resolved.attention.name == name
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True))
        assert engine.metrics().num_compilations_after_ready == 0
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(model_dir: pathlib.Path) -> list[list[int]]:
    return write(model_dir, "xla", "")


@pytest.mark.parametrize("mesh", ["", "context:2,tensor:2"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_same_tokens(name: str, mesh: str, model_dir: pathlib.Path, expected: list[list[int]]):
    skip_where_it_cannot(name, "float32", tiny_model.SIZES["page_size"], parse_mesh(mesh).get("context", 1))
    if (needed := math.prod(parse_mesh(mesh).values())) > jax.device_count():
        pytest.skip(f"needs {needed} devices")
    assert write(model_dir, name, mesh) == expected


@pytest.mark.parametrize("name", KERNELS)
def test_logits_of_bfloat16_are_as_near_to_those_of_float32(name: str, model_dir: pathlib.Path):
    """Of a prompt in chunks and of the tokens after it. Backends round at different places."""
    skip_where_it_cannot(name, "bfloat16", driver.Shapes.page_size)
    prompt = np.random.default_rng(0).integers(0, 256, 40).tolist()
    run = functools.partial(driver.continue_prompts, model_dir, [prompt], 4, chunk=16, num_steps=0)
    (exact,) = run(backend="xla", dtype="float32")
    found = [run(backend=each, dtype="bfloat16")[0] for each in (name, "xla")]
    num_equal = min(sum(np.cumprod(np.equal(each.tokens, exact.tokens))) for each in found)
    seen = slice(len(prompt) + num_equal - 1)
    ours, theirs = (np.abs(each.logits[seen] - exact.logits[seen]) for each in found)
    assert np.sqrt(np.mean(ours**2)) < 1.1 * np.sqrt(np.mean(theirs**2))
    assert np.quantile(ours, 0.99) < 1.1 * np.quantile(theirs, 0.99) and ours.max() < 1.3 * theirs.max()
