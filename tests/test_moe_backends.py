"""An engine writes the same tokens with every backend of its experts. On a CPU kernels are interpreted."""

import pathlib

import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.engine_config import EngineConfig
from jaxinfer.resolve import resolve
from pallas_kernels.grouped_matmul import backends
from tests.parity import recipe

SIZES = {"max_model_len": 32, "max_num_batched_tokens": 16, "decode_steps": 1, "page_size": 16}
PROMPTS = [recipe.prompt(length, 128, length) for length in (3, 9)]


def make(directory: pathlib.Path, family: str) -> pathlib.Path:
    config = recipe.first_config(family) | {"num_hidden_layers": 1}
    return recipe.write_model(directory, config, recipe.weights(family, config))


def write(model_dir: pathlib.Path, backend: str, mesh: str) -> list[list[int]]:
    num_slots = 2 if mesh else 1
    with Engine(str(model_dir), moe_backend=backend, mesh=mesh, max_num_seqs=num_slots, **SIZES) as engine:
        assert f"experts: {'xla' if backend == 'auto' else backend}\n" in engine.resolved.summary
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(("family", "mesh"), [("qwen3_moe", ""), ("gpt_oss", "expert:2,tensor:2")])
@pytest.mark.parametrize("backend", [name for name in backends() if name != "xla"])
def test_the_same_tokens(backend: str, family: str, mesh: str, tmp_path: pathlib.Path):
    model_dir = make(tmp_path / "model", family)
    assert write(model_dir, backend, mesh) == write(model_dir, "auto", mesh)


def test_what_is_too_small_on_a_mesh_is_refused(tmp_path: pathlib.Path):
    """Sizes are those on a device."""
    model_dir = make(tmp_path / "model", "qwen3_moe")
    config = EngineConfig(model=str(model_dir), moe_backend="triton", mesh="tensor:8", sharding="expert_sums")
    needs = r"--moe_backend=triton: it multiplies by 16 numbers at once, and a weight has a dimension of 4"
    with pytest.raises(ValueError, match=needs):
        resolve(config)
