"""An engine writes the same tokens with every attention backend. On a CPU kernels are interpreted."""

import pathlib

import pytest

from jaxinfer import Engine, SamplingParams
from pallas_kernels.paged_attention import backends
from tests import tiny_model

PROMPTS = ["a", "abc" * 15, "xyzw"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Heads of 16 numbers, which a matrix unit takes."""
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny", head_dim=16, num_attention_heads=4)


def write(model_dir: pathlib.Path, backend: str, mesh: str) -> list[list[int]]:
    with Engine(str(model_dir), attention_backend=backend, mesh=mesh, **tiny_model.SIZES) as engine:
        assert engine.resolved.attention.name == ("xla" if backend == "auto" else backend)
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(model_dir: pathlib.Path) -> list[list[int]]:
    return write(model_dir, "auto", "")


@pytest.mark.parametrize("mesh", ["", "context:2,tensor:2"])
@pytest.mark.parametrize("backend", [name for name in backends() if name != "xla"])
def test_the_same_tokens(backend: str, mesh: str, model_dir: pathlib.Path, expected: list[list[int]]):
    assert write(model_dir, backend, mesh) == expected
