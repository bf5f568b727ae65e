"""An engine writes the same tokens with every attention backend. On a CPU kernels are interpreted."""

import functools
import math
import pathlib

import jax
import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.meshes import parse_mesh
from pallas_kernels.paged_attention import backends
from tests import tiny_model
from tests.parity import driver

pytestmark = pytest.mark.any_device

PROMPTS = ["a", "abc" * 15, "xyzw"]
KERNELS = [name for name in backends() if name != "xla"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Heads of 16 numbers, which a matrix unit takes."""
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny", head_dim=16, num_attention_heads=4)


def write(model_dir: pathlib.Path, backend: str, mesh: str) -> list[list[int]]:
    sizes = {"mesh": mesh, "dtype": "float32", **tiny_model.SIZES}
    with Engine(str(model_dir), attention_backend=backend, **sizes) as engine:
        assert engine.resolved.attention.name == backend
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True))
        assert engine.metrics().num_compilations_after_ready == 0
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(model_dir: pathlib.Path) -> list[list[int]]:
    return write(model_dir, "xla", "")


@pytest.mark.parametrize("mesh", ["", "context:2,tensor:2"])
@pytest.mark.parametrize("backend", KERNELS)
def test_the_same_tokens(backend: str, mesh: str, model_dir: pathlib.Path, expected: list[list[int]]):
    if (needed := math.prod(parse_mesh(mesh).values())) > jax.device_count():
        pytest.skip(f"needs {needed} devices")
    assert write(model_dir, backend, mesh) == expected


@pytest.mark.parametrize("backend", KERNELS)
def test_logits_agree_but_for_rounding(backend: str, model_dir: pathlib.Path):
    """Of a prompt in chunks and of the tokens after it, in bfloat16."""
    prompt = np.random.default_rng(0).integers(0, 256, 40).tolist()
    run = functools.partial(driver.continue_prompts, model_dir, [prompt], 4, chunk=16, num_steps=0, dtype="bfloat16")
    (ours,), (theirs,) = run(backend=backend), run(backend="xla")
    num_equal = sum(np.cumprod(np.equal(ours.tokens, theirs.tokens)))
    seen = slice(len(prompt) + num_equal - 1)
    difference = np.abs(ours.logits[seen] - theirs.logits[seen])
    assert difference.max() < 0.05 * np.std(theirs.logits)
    assert np.quantile(difference, 0.99) < 0.02 * np.std(theirs.logits)
