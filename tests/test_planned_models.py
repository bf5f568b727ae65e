"""What fits where: models that people ask about, with the arithmetic spelled out."""

from typing import Any

import jax.numpy as jnp
import pytest

from jaxinfer.parameters import ModelDefinition, model_weights
from jaxinfer.partitioning import Partitioner
from jaxinfer.planner import GIB, KIB
from jaxinfer.planning.candidates import Candidate, Rejection
from jaxinfer.planning.hardware import GPUS
from jaxinfer.tools.plan_cases import SIZE_130B
from tests import plans, published

ROOM = 0.95 * 0.9  # of a GPU's memory: XLA_PYTHON_CLIENT_MEM_FRACTION, and --memory_fraction of that


def fitting(found: list[Candidate | Rejection]) -> set[str]:
    return {each.mesh for each in found if isinstance(each, Candidate)}


def test_llama_13b_in_float16_on_two_to_four_rtx_3090():
    """26 GB in all: one GPU of 23.69 GiB is too small, two have 13 GB each, and 7.9 GiB for the cache."""
    embed, mlp, layers, vocab = 5120, 13_824, 40, 32_000
    layer = 4 * embed * embed + 3 * embed * mlp + 2 * embed
    num_bytes = 2 * (2 * vocab * embed + layers * layer + embed)
    assert num_bytes == 26_031_728_640
    sizes: dict[str, Any] = {"dtype": "float16", "prompt_tokens": 3584, "output_tokens": 512}
    alone = plans.planner("llama_2_13b", "rtx3090-24g:1", **sizes).candidate("data:1")
    assert plans.reason(alone).startswith("24.24 GiB weights + ") and "> 20.25 GiB a device" in plans.reason(alone)

    two = plans.candidate(plans.planner("llama_2_13b", "rtx3090-24g:2", **sizes).candidate("tensor:2"))
    memory = two.plan.memory
    norms = 2 * (layers * 2 * embed + embed)  # which both have
    assert memory.weights_bytes == (num_bytes - norms) // 2 + norms
    assert memory.page_bytes // memory.page_size == 2 * layers * (40 // 2) * 128 * 2 == 400 * KIB
    room = int(0.9 * int(0.95 * GPUS["rtx3090-24g"].memory_bytes)) - memory.weights_bytes - memory.workspace_bytes
    pages = room // memory.page_bytes
    assert two.performance.num_seqs == (pages - 1) // (4096 // 64) == 5  # 1.6 GiB each on each of the two

    assert fitting([*plans.planner("llama_2_13b", "rtx3090-24g:2", **sizes).candidates()]) >= {"tensor:2", "stage:2"}
    of_three = [*plans.planner("llama_2_13b", "rtx3090-24g:3", **sizes).candidates()]
    assert "stage:3" in fitting(of_three)  # of 13, 13 and 14 layers
    reasons = {each.mesh: each.reason for each in of_three if isinstance(each, Rejection)}
    assert reasons["tensor:3"].startswith(
        "kv_heads 40 neither divides nor is divided by the 3 devices of --mesh tensor:3"
    )
    four = plans.candidate(plans.planner("llama_2_13b", "rtx3090-24g:4", **sizes).candidate("tensor:4"))
    assert four.performance.num_seqs > 3 * two.performance.num_seqs


def test_qwq_32b_in_bfloat16_on_two_a6000():
    """65.5 GB: 30.5 GiB on each of two of 47.5, beside 9 GiB of cache at 128 KiB a token."""
    num_bytes = 2 * 32_763_876_352
    assert model_weights(published.read("qwq_32b"), jnp.dtype("bfloat16")).num_bytes == num_bytes
    sizes: dict[str, Any] = {"prompt_tokens": 7168, "output_tokens": 1024}
    assert "61.03 GiB weights" in plans.reason(plans.planner("qwq_32b", "a6000-48g", **sizes).candidate("data:1"))
    both = plans.candidate(plans.planner("qwq_32b", "a6000-48g:2", **sizes).candidate("tensor:2"))
    memory = both.plan.memory
    assert memory.weights_bytes / GIB == pytest.approx(61.03 / 2, abs=0.02)
    assert memory.page_bytes // memory.page_size == 2 * 64 * (8 // 2) * 128 * 2 == 128 * KIB
    held = memory.weights_bytes + memory.workspace_bytes + memory.cache_bytes
    assert held <= int(0.9 * int(0.95 * GPUS["a6000-48g"].memory_bytes))
    assert both.performance.num_seqs == 9  # of a GiB on each


def test_130_billion_parameters_on_h100():
    """In float16 260 GB, which four hold and two do not; in 4 bits 65, which one holds."""
    asked: dict[str, Any] = {"dtype": "float16", "model": SIZE_130B, "prompt_tokens": 512}
    for itemsize, gigabytes, num_gpus, mesh in ((2, 260, 4, "tensor:4"), (0.5, 65, 1, "data:1")):
        planner = plans.planner("llama_2_13b", f"h100:{num_gpus}", itemsize=itemsize, **asked)
        assert planner.weights.num_bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)
        memory = plans.candidate(planner.candidate(mesh)).plan.memory
        assert memory.weights_bytes / 1e9 == pytest.approx(65, rel=0.01)
    two = plans.planner("llama_2_13b", "h100:2", **asked)
    assert "121.57 GiB weights" in plans.reason(two.candidate("tensor:2"))
    assert two.more_devices() == "h100:4"


def test_70b_at_128k_tokens_and_what_it_would_be_without_grouped_queries():
    """320 KiB a token with 8 KV heads, 2.5 MiB with 64: a sequence of 131,072 tokens takes 40 GiB, or 320."""
    sizes: dict[str, Any] = {"prompt_tokens": 2**17 - 1024, "output_tokens": 1024}
    grouped, without = (
        plans.candidate(plans.planner("llama_3_1_70b_instruct", "h100:8", model=model, **sizes).candidate("tensor:8"))
        for model in ({}, {"num_kv_heads": 64})
    )
    for found, kv_heads, gib in ((grouped, 8, 40), (without, 64, 320)):
        memory = found.plan.memory
        assert 8 * memory.page_bytes // memory.page_size == 2 * 80 * kv_heads * 128 * 2
        assert 8 * memory.page_bytes // memory.page_size * 2**17 == gib * GIB
    assert (
        without.plan.memory.weights_bytes - grouped.plan.memory.weights_bytes == 2 * 80 * (64 - 8) * 128 * 8192 * 2 / 8
    )
    assert (grouped.performance.num_seqs, without.performance.num_seqs) == (10, 1)


def test_mixtral_8x7b_with_its_experts_on_two_h100():
    """46.7 billion parameters, 12.9 of them for each token: 93 GB are held, and a sequence alone reads 26."""
    planner = plans.planner("mixtral_8x7b_instruct_v0_1", "h100:2")
    assert planner.weights.num_params == 46_702_792_704
    expert = 3 * 4096 * 14_336
    by_expert, by_tensor = (plans.candidate(planner.candidate(mesh)) for mesh in ("expert:2", "tensor:2"))
    shared = 46_702_792_704 - 32 * 8 * expert
    vocabulary = 2 * 32_000 * 4096
    assert by_expert.plan.memory.weights_bytes == 2 * (32 * 4 * expert + shared)  # attention and vocabulary are whole
    norms = (2 * 32 + 1) * 4096 + 32 * 8 * 4096  # and routers
    assert by_tensor.plan.memory.weights_bytes == 2 * (32 * 4 * expert + (shared - norms) // 2 + norms)
    stage = by_tensor.model.weights.stages[0]
    active = 2 * (stage.dense_numbers + stage.expert_numbers) + vocabulary
    assert active == pytest.approx(12.88e9, rel=0.01)
    assert "86.99 GiB weights" in plans.reason(planner.candidate("data:2"))


def test_deepseek_v3_over_two_nodes_of_eight_h200():
    """1,342 GB in bfloat16. The cache of all heads is one latent: 576 numbers a layer, 68.6 KiB a token."""
    planner = plans.planner("deepseek_v3", "h200:2x8")
    assert planner.weights.num_bytes == 2 * 671_026_419_200 + 58 * 256 * 2  # biases of choices are float32
    best = plans.candidate(planner.candidate("stage:2,expert:8"))
    memory = best.plan.memory
    assert memory.page_bytes // memory.page_size == 31 * 576 * 2  # the longer of the stages has 31 layers
    one_node = plans.planner("deepseek_v3", "h200:8").candidate("expert:8")
    assert "> 120.04 GiB a device" in plans.reason(one_node)
    assert str(planner.cluster) == "16 x NVIDIA H200, 2 nodes of 8 over NVLink 4, nodes over 400 Gb/s per GPU"
    across, inside = (planner.cluster.link_of((axis,), {"stage": 2, "expert": 8}) for axis in ("stage", "expert"))
    assert (across.name, inside.name) == ("400 Gb/s per GPU", "NVLink 4")
    assert planner.cluster.link_of(("expert",), {"expert": 16}).name == "400 Gb/s per GPU"


@pytest.mark.parametrize("name", published.names())
def test_the_weights_of_published_models_are_those_of_their_definition(name: str):
    config = published.read(name)
    if not hasattr(config, "windows"):
        pytest.skip("an encoder")
    dtype = jnp.dtype("bfloat16")
    definition = ModelDefinition.create(config, Partitioner.abstract(""), dtype)
    assert model_weights(config, dtype).num_bytes == definition.weight_bytes
