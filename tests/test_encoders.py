"""What every encoder does beside agreeing with transformers: the same vectors in any batch and on every mesh."""

import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer import Engine, models
from jaxinfer.checkpoint.hf_writer import write_model
from jaxinfer.config import EncoderConfig
from jaxinfer.embedder import POOLINGS, Embedder
from jaxinfer.encoder_batch import EncoderShape
from jaxinfer.engine_config import EngineConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.resolve import ResolvedEncoder, resolve
from jaxinfer.stats import EngineStats
from tests.long_campaign import chosen
from tests.parity import driver, recipe

MESHES = chosen(("tensor:2", "tensor:4", "data:2,tensor:2"), "data:2,tensor:2")
LENGTHS = (5, 32, 30, 1, 16, 17, 5, 31)
MAX_DIFFERENCE = 1e-5  # of vectors of length 1
SIZES: dict[str, Any] = {"max_model_len": 32, "max_num_seqs": 2}


@pytest.fixture(params=models.encoders())
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(family: str) -> dict[str, Any]:
    return recipe.first_config(family)


@pytest.fixture
def model_dir(family: str, config: dict[str, Any], tmp_path: pathlib.Path) -> pathlib.Path:
    return recipe.write_model(tmp_path / "model", config, recipe.weights(family, config))


def prompts() -> list[list[int]]:
    return [recipe.prompt(length, 128, seed) for seed, length in enumerate(LENGTHS)]


def embed_all(model_dir: pathlib.Path, mesh: str) -> np.ndarray:
    """Of both poolings, one after the other."""
    with Engine(str(model_dir), mesh=mesh, **SIZES) as engine:
        return np.concatenate([engine.embed(prompts(), pooling=pooling) for pooling in POOLINGS])


def test_says_that_it_is_an_encoder(family: str, config: dict[str, Any]):
    """In its attribute, which everybody asks, as in the kind of its config."""
    for decoder in models.decoders():
        module = models.get(decoder)
        assert not isinstance(module.parse_config(HFConfig(recipe.first_config(decoder))), EncoderConfig)
    assert isinstance(models.get(family).parse_config(HFConfig(config)), EncoderConfig)


def test_same_vectors_on_every_mesh(model_dir: pathlib.Path):
    expected = embed_all(model_dir, "")
    for mesh in MESHES:
        assert np.abs(embed_all(model_dir, mesh) - expected).max() < MAX_DIFFERENCE, mesh


def test_neither_padding_nor_neighbours_show(model_dir: pathlib.Path):
    """Alone a prompt is padded to another shape, and in another order it has other neighbours."""
    with Engine(str(model_dir), **SIZES) as engine:
        for pooling in POOLINGS:
            together = engine.embed(prompts(), pooling=pooling)
            alone = np.concatenate([engine.embed(prompt, pooling=pooling) for prompt in prompts()])
            reversed_ = engine.embed(prompts()[::-1], pooling=pooling)[::-1]
            assert np.abs(alone - together).max() < MAX_DIFFERENCE
            assert np.abs(reversed_ - together).max() < MAX_DIFFERENCE
            assert np.abs(together[0] - together[6]).max() > 0.1  # as long, and other tokens
        assert engine.metrics().num_compilations_after_ready == 0


def test_weights_come_back_byte_for_byte(model_dir: pathlib.Path, config: dict[str, Any], tmp_path: pathlib.Path):
    """Read onto a mesh that splits heads, and written again."""
    write_model(tmp_path / "again", config, *driver.load(model_dir, "tensor:4"))
    before, after = (load_file(directory / "model.safetensors") for directory in (model_dir, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name


@pytest.mark.parametrize("mesh", ["tensor:4", "data:2,tensor:2", "data:2"])
def test_what_devices_send_each_other(mesh: str, model_dir: pathlib.Path):
    """Over `tensor` the embedding, each attention and each MLP are summed, and no activations are gathered."""
    resolved = resolve(EngineConfig(model=str(model_dir), mesh=mesh, **SIZES))
    assert isinstance(resolved, ResolvedEncoder)
    shape = resolved.buckets.shapes()[-1]
    text = Embedder(resolved, (), EngineStats()).program(shape).lower().compile().as_text() or ""
    found = re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)
    num_sums = 1 + 2 * resolved.definition.config.num_layers if "tensor" in mesh else 0
    num_gathered = len(POOLINGS) if "data" in mesh else 0  # the vectors, for the host
    assert sorted(found) == ["all-gather"] * num_gathered + ["all-reduce"] * num_sums


@pytest.mark.parametrize(
    ("mesh", "max_model_len", "changes"),
    [
        ("", 256, {}),  # attention's scores are the most
        ("tensor:4", 256, {}),
        ("data:2", 256, {}),
        ("", 16, {"intermediate_size": 1024}),  # the MLP's activations are
    ],
)
def test_the_plan_has_room_for_what_xla_allocates(
    mesh: str, max_model_len: int, changes: dict[str, int], config: dict[str, Any], tmp_path: pathlib.Path
):
    model_dir = recipe.write_model(tmp_path / "model", config | changes, {"nothing": np.zeros(1)})  # it is not read
    settings: dict[str, Any] = {"max_model_len": max_model_len, "max_num_seqs": 64, "max_num_batched_tokens": 1024}
    resolved = resolve(EngineConfig(model=str(model_dir), mesh=mesh, **settings))
    assert isinstance(resolved, ResolvedEncoder)
    embedder, planned = Embedder(resolved, (), EngineStats()), resolved.memory.workspace_bytes
    largest = 0
    for length, rows in resolved.buckets.rows.items():
        analysis = embedder.program(EncoderShape(rows[-1], length)).lower().compile().memory_analysis()
        assert analysis is not None
        largest = max(largest, analysis.temp_size_in_bytes)
    print(f"{largest} of {planned} bytes")
    assert 0.55 * planned < largest < 1.05 * planned


def test_a_mesh_that_does_not_divide_the_heads_is_refused(family: str, config: dict[str, Any]):
    """Not even by copies, as KV heads are."""
    odd = models.get(family).parse_config(HFConfig(config | {"num_attention_heads": 2}))
    with pytest.raises(ValueError, match="layers/0/attention/k/bias: heads 2 does not divide over --mesh tensor:4"):
        ModelDefinition.create(odd, Partitioner.create("tensor:4"), jnp.dtype("float32"))
