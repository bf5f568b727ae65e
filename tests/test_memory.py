"""Whether a model fits its devices: what a step allocates against the plan, and what is advised where it does not."""

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.batch import max_chunk_tokens
from jaxinfer.config import ModelConfig, MoEConfig, RopeConfig
from jaxinfer.engine_config import EngineConfig
from jaxinfer.extras import ExtrasSpec
from jaxinfer.memory import Demand
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.planning.compiled import sampler_bytes
from pallas_kernels.grouped_matmul import xla as grouped_matmul
from pallas_kernels.paged_attention import AttentionSpec, mosaic_gpu, xla
from sharding_rules import axes as ax
from tests.long_campaign import chosen
from tests.parity import driver

SMALL = ModelConfig(
    family="llama",
    vocab_size=512,
    embed_dim=64,
    num_layers=2,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=16,
    mlp_dim=128,
    max_position=1024,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
)


@functools.cache
def definition_of(model: ModelConfig, mesh: str, rules: str, dtype: str = "float32") -> ModelDefinition:
    return ModelDefinition.create(model, Partitioner.create(mesh, rules), jnp.dtype(dtype))


@functools.cache
def demand(
    model: ModelConfig = SMALL, mesh: str = "", free_bytes: int | None = None, rules: str = "auto", **flags: Any
) -> Demand:
    definition = definition_of(model, mesh, rules)
    settings = {"max_model_len": 1024, "max_num_seqs": 8, "mesh": mesh, "sharding": rules} | flags
    return Demand.of(definition, config=EngineConfig(**settings), page_size=16, attention=xla, free_bytes=free_bytes)


EXPERTS = MoEConfig(num_experts=4, num_experts_per_token=2, mlp_dim=4096)
HEADS = {"head_dim": 128, "embed_dim": 256}
RESIDUAL = {"embed_dim": 2048}
WIDE = {"moe": MoEConfig(num_experts=8, num_experts_per_token=2, mlp_dim=64), "embed_dim": 512, "vocab_size": 64}


@pytest.mark.usefixtures("whole_contexts")
def test_the_workspace_of_attention():
    """Four rows and three tiles of 32: their keys and values, their tokens' scores, and their queries."""
    spec = AttentionSpec(num_q_heads=6, num_kv_heads=2, head_dim=8, page_size=4, scale=1.0)
    sizes = {"rows": 4, "chunks": 3, "chunk_tokens": 32, "context_tokens": 100, "itemsize": 2}
    scores, query_numbers = (4 + 3 * 32) * (2 * 4 * 100 * 6), (4 + 3 * 32) * 6 * 8
    of_pages = 7 * (2 * 100 * 2 * 8 * 2)
    assert xla.workspace_bytes(spec, **sizes) == of_pages + scores + query_numbers * (2 + 2 + 4)
    of_one_page = 7 * (2 * 4 * 2 * 8 * 2) + scores // 25
    spread = dataclasses.replace(spec, context_size=25)
    assert xla.workspace_bytes(spread, **sizes) == of_one_page + query_numbers * (4 + 4 + 4)


CHUNKED = {"max_num_batched_tokens": 256, "max_model_len": 128}
WORKSPACES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "blocks": ("blocks", {}, "", {"max_num_batched_tokens": 256}),
    "blocks on a mesh": ("blocks", {}, "data:2,tensor:2", {"max_num_batched_tokens": 256}),
    "chunks' scores": ("whole", {}, "", {"max_num_batched_tokens": 256}),
    "rows' pages": ("whole", {}, "", {"max_num_seqs": 32, "max_num_batched_tokens": 16}),
    "logits": ("blocks", {"vocab_size": 64_000}, "", {"max_model_len": 64}),
    "logits of a mesh": ("blocks", {"vocab_size": 64_000}, "tensor:2", {"max_model_len": 64}),
    "parts' scores": ("whole", {}, "context:4", {"max_num_seqs": 4, "max_num_batched_tokens": 64}),
    "parts": ("blocks", {}, "context:4", {}),
    "mlp": ("blocks", {"mlp_dim": 8192}, "", {"max_model_len": 128}),
    "heads": ("blocks", HEADS | {"num_layers": 4}, "", CHUNKED),
    "as many kv heads": ("blocks", HEADS | {"num_kv_heads": 8}, "", CHUNKED),
    "parts of heads": ("blocks", HEADS, "context:4", CHUNKED),
    "residual stream": ("blocks", RESIDUAL, "", CHUNKED),
    "residual stream and mlp": ("blocks", {"embed_dim": 512, "mlp_dim": 1024}, "", {"max_model_len": 128}),
    "stages": ("blocks", {}, "stage:2", CHUNKED),
    "stages of a mesh": ("blocks", {}, "data:2,stage:2,tensor:2", CHUNKED),
    "stages' mlp": ("blocks", {"mlp_dim": 8192}, "stage:2", CHUNKED),
    "stages' heads": ("blocks", HEADS, "stage:2", CHUNKED),
    "experts": ("blocks", {"moe": EXPERTS}, "", {"max_model_len": 128}),
    "one expert each": ("blocks", {"moe": EXPERTS}, "expert:4", {"max_model_len": 128, "rules": "expert_sums"}),
    "experts' rows that travel": ("blocks", WIDE, "expert:4", {"max_model_len": 128}),
}
PLAIN = (
    "blocks on a mesh",
    "chunks' scores",
    "logits of a mesh",
    "parts",
    "heads",
    "residual stream",
    "stages",
    "experts",
)


@pytest.mark.parametrize("name", chosen([*WORKSPACES], *PLAIN, "experts' rows that travel"))
def test_the_workspace_is_what_compiled_steps_allocate(name: str, request: pytest.FixtureRequest):
    """The estimate is at least that, and at most half as much again, but for what is kept from step to step."""
    contexts, model, mesh, flags = WORKSPACES[name]
    if contexts == "whole":
        request.getfixturevalue("whole_contexts")
    wanted = demand(dataclasses.replace(SMALL, **model), mesh, **flags)
    plan, config = wanted.plan(), wanted.config
    assert config.max_model_len is not None
    rows = plan.pages_per_shard // (config.max_model_len // 16)
    shapes = driver.Shapes(
        rows=rows,
        max_len=config.max_model_len,
        chunk=max_chunk_tokens(config.max_num_batched_tokens, config.max_model_len, rows),
        num_steps=1,
    )
    programs = driver.step_programs(definition_of(wanted.model, mesh, config.sharding), shapes)
    allocated = 0
    for shape in programs.buckets.shapes():
        allocated = max(allocated, temporary_bytes(programs.lowered(shape)))
    if wanted.model.vocab_size > SMALL.vocab_size:
        one_token = [shape for shape in programs.buckets.shapes() if shape.num_steps == 1]
        widest = max(one_token, key=lambda shape: shape.rows + shape.chunks)
        allocated = max(allocated, sampler_bytes(programs, widest))
    assert allocated <= 1.02 * plan.temporary_bytes
    assert plan.temporary_bytes <= 1.5 * allocated


def temporary_bytes(lowered: jax.stages.Lowered) -> int:
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("rules", ["inference", "expert_sums"])
def test_the_tile_of_experts_is_planned_as_it_is_computed(rules: str, monkeypatch: pytest.MonkeyPatch):
    """Rows, and experts that a device has of its own; the most of a step, which is traced only."""
    calls, original = [], grouped_matmul.tile_rows
    monkeypatch.setattr(grouped_matmul, "tile_rows", lambda *sizes: calls.append(sizes) or original(*sizes))
    asked = demand(dataclasses.replace(SMALL, **WIDE), "expert:4", max_num_batched_tokens=64, rules=rules)
    asked.plan()
    (planned,) = set(calls)
    calls.clear()
    rows = 8 // asked.splits.num_shards(ax.BATCH)
    shapes = driver.Shapes(rows=rows, max_len=64, chunk=64, num_steps=0)
    programs = driver.step_programs(definition_of(asked.model, "expert:4", rules), shapes)
    for shape in programs.buckets.shapes():
        programs.lowered(shape)
    assert set(calls) == {planned}


def test_what_sampling_keeps_of_each_slot_is_in_the_workspace(monkeypatch: pytest.MonkeyPatch):
    """A history of 4-byte tokens and a bias per token of the vocabulary, mostly."""
    asked = demand(max_num_seqs=4)
    whole = asked.plan().workspace_bytes
    monkeypatch.setattr(ExtrasSpec, "slots_bytes", 0)
    of_slot = (whole - asked.plan().workspace_bytes) / 4
    assert 4 * (1024 + SMALL.vocab_size) < of_slot < 4 * (1024 + SMALL.vocab_size) + 4096


def advice(asked: Demand) -> list[str]:
    with pytest.raises(ValueError, match="; would fit: ") as caught:
        asked.plan()
    return str(caught.value).rpartition("; would fit: ")[2].split(" or ")


def asked_again(asked: Demand, definition: ModelDefinition) -> Demand:
    """The same of another definition."""
    others = {name: getattr(asked, name) for name in ("config", "page_size", "attention", "free_bytes")}
    return Demand.of(definition, **others)


def flags_of(texts: list[str]) -> dict[str, str]:
    """Beside meshes, of which there may be several."""
    flags = [text.removeprefix("--").split("=") for text in texts]
    return {name: value for name, value in flags if name != "mesh"}


def meshes_of(texts: list[str]) -> list[str]:
    return [text.removeprefix("--mesh=") for text in texts if text.startswith("--mesh=")]


@pytest.mark.usefixtures("whole_contexts")
def test_each_flag_of_the_advice_is_enough_and_the_next_size_is_not():
    sizes = {"max_num_seqs": 32, "max_num_batched_tokens": 128}
    whole = demand(**sizes).plan()
    asked = demand(free_bytes=int((whole.weights_bytes + whole.workspace_bytes) / 0.9), **sizes)
    flags = flags_of(advice(asked))
    assert flags.keys() == {"max_model_len", "max_num_seqs", "max_num_batched_tokens", "dtype"}
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        sizes = [int(flags[name]), int(flags[name]) + 1]
        fitting, other = (dataclasses.replace(asked.config, **{name: size}) for size in sizes)
        dataclasses.replace(asked, config=fitting).plan()
        assert name in str(advice(dataclasses.replace(asked, config=other)))
    asked_again(asked, definition_of(SMALL, "", "auto", flags["dtype"])).plan()
    assert meshes_of(advice(asked)) == ["tensor:2", "context:2"]
    for mesh in meshes_of(advice(asked)):
        asked_again(asked, definition_of(SMALL, mesh, "auto")).plan()


def test_a_mesh_grows_until_it_fits_beyond_the_devices_that_are_here():
    model = dataclasses.replace(SMALL, num_q_heads=16, num_kv_heads=4, mlp_dim=65_536)
    of_two = demand(model, "tensor:2", max_num_batched_tokens=16).plan()
    asked = demand(model, "tensor:2", int(of_two.weights_bytes / 5), max_num_batched_tokens=16)
    assert advice(asked) == ["--mesh=tensor:16", "--mesh=tensor:2,context:8"]


def test_a_strategy_that_was_chosen_is_kept():
    whole = demand().plan()
    free_bytes = int((whole.weights_bytes + whole.workspace_bytes) / 0.9)
    assert meshes_of(advice(demand(free_bytes=free_bytes)))
    assert not meshes_of(advice(demand(free_bytes=free_bytes, sharding="replicated")))


@pytest.mark.usefixtures("whole_contexts")
def test_the_data_axis_divides_the_advised_sequences():
    sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 128}
    whole = demand(mesh="data:2", **sizes).plan()
    asked = demand(mesh="data:2", free_bytes=int((whole.weights_bytes + whole.workspace_bytes) / 0.9), **sizes)
    flags = flags_of(advice(asked))
    assert int(flags["max_num_seqs"]) in range(50, 64, 2)
    assert meshes_of(advice(asked)) == ["data:2,tensor:2", "data:2,context:2"]


@pytest.mark.usefixtures("whole_contexts")
def test_a_cache_that_was_chosen_too_small_or_too_large():
    assert advice(demand(kv_cache_bytes=20_000))[0] == "no --kv_cache_bytes at all"
    sizes = {"max_num_batched_tokens": 64}
    whole = demand(**sizes).plan()
    asked = demand(free_bytes=int((whole.weights_bytes + whole.workspace_bytes) * 1.2), kv_cache_bytes=2**40, **sizes)
    assert advice(asked)[0] == "no --kv_cache_bytes at all"


def test_a_cache_of_8_bits_where_it_is_the_cache_that_does_not_fit():
    model = dataclasses.replace(SMALL, num_q_heads=4, num_layers=32)
    whole = demand(model, max_num_batched_tokens=64).plan()
    of_sequence = (1 + 1024 // 16) * whole.page_bytes
    asked = demand(
        model,
        free_bytes=int((whole.weights_bytes + whole.workspace_bytes + of_sequence / 2) / 0.9),
        max_num_batched_tokens=64,
    )
    assert flags_of(advice(asked))["kv_cache_dtype"] == "int8"
    dataclasses.replace(asked, config=dataclasses.replace(asked.config, kv_cache_dtype="int8")).plan()


@pytest.mark.parametrize(("attention", "possible"), [(xla, True), (mosaic_gpu, False)])
def test_no_advice_that_the_attention_cannot_take(attention: ModuleType, possible: bool):
    """Hopper's reads neither a cache of 8 bits nor sequences on several devices."""
    model = dataclasses.replace(SMALL, num_q_heads=4, head_dim=64, num_layers=32)
    asked = dataclasses.replace(
        asked_again(demand(model, max_num_batched_tokens=64), definition_of(model, "", "auto", "bfloat16")),
        attention=attention,
        page_size=64,
    )
    whole = asked.plan()
    of_sequence = (1 + 1024 // 64) * whole.page_bytes
    room = whole.weights_bytes + whole.workspace_bytes + 0.7 * of_sequence
    found = {*advice(dataclasses.replace(asked, free_bytes=int(room / 0.9)))}
    assert ({"--mesh=context:2"} <= found) == possible
    assert any("kv_cache_dtype" in flag for flag in found) == possible


def test_where_nothing_helps():
    model = dataclasses.replace(SMALL, num_q_heads=1, num_kv_heads=1, num_layers=1)
    assert advice(demand(model, free_bytes=1000)) == ["a smaller model"]
