"""What XLA says of steps for GPUs: of every GPU that plans know, and that temporaries do not grow with the layers.

Compiled, not run: no GPU is needed.
"""

import jax
import pytest

from jaxinfer.planning import facts
from jaxinfer.planning.compiled import CompiledStep, compile_step, shard_bytes
from jaxinfer.planning.hardware import GPUS
from jaxinfer.planning.programs import devices_of, planned_programs, widest_shapes
from pallas_kernels.paged_attention import AttentionSpec, backend, choose
from tests import gpu_targets, plans

pytestmark = pytest.mark.skipif(gpu_targets.missing() is not None, reason=str(gpu_targets.missing()))

SMALL = {"vocab_size": 512, "embed_dim": 512, "num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "mlp_dim": 1024}


@pytest.mark.parametrize("gpu", GPUS)
def test_a_kernel_compiles_for_every_gpu_that_plans_know(gpu: str):
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16, scale=0.125, dtype="bfloat16")
    (device,) = gpu_targets.devices(gpu)
    assert device.compute_capability == ".".join(map(str, GPUS[gpu].capability))
    assert choose([spec], device).name == "triton"

    def attend(*arrays):
        return backend("triton").paged_attention(*arrays, spec=spec)

    q, pages = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((8, 1, 4, 64), (64, 2, 16, 64)))
    tables, positions = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((8, 4), (8, 1)))
    compiled = gpu_targets.compile_for(gpu, attend, q, pages, pages, tables, positions)
    assert "attend_kernel" in (compiled.as_text() or "")


def compile_planned(name: str, devices: str, mesh: str, *, kind: str, all_layers: bool, **model: int) -> CompiledStep:
    """Of a step as it is planned. Its arguments are what the plan says, to the byte."""
    planner = plans.planner(name, devices, model=SMALL | model, prompt_tokens=480, output_tokens=32, num_seqs=8)
    candidate = plans.candidate(planner.candidate(mesh))
    on_gpus = devices_of(planner.cluster, candidate.num_devices)
    programs, counts = planned_programs(planner, candidate, on_gpus, all_layers=all_layers)
    assert programs.backend == "triton"
    shape = widest_shapes(programs.buckets)[kind]
    step, memory = compile_step(programs, shape, counts), candidate.plan.memory
    of_step = shard_bytes(programs.arguments(shape)[2:])
    assert step.argument_bytes == memory.weights_bytes + memory.cache_bytes + of_step
    return step


@pytest.mark.parametrize(
    ("name", "devices", "mesh", "kind", "num_layers"),
    [
        ("llama_3_2_1b", "h100", "", "prefill", 4),
        ("llama_3_2_1b", "h100:2x2", "stage:2,tensor:2", "decode", 6),
        ("qwen_3_30b_a3b", "h100:2", "expert:2", "prefill", 3),
    ],
)
def test_few_layers_stand_for_all(name: str, devices: str, mesh: str, kind: str, num_layers: int):
    """On one GPU, on two nodes, and where rows travel to their experts, which is in loops that begin with an array."""
    few, every = (
        compile_planned(name, devices, mesh, kind=kind, all_layers=all_layers, num_layers=num_layers)
        for all_layers in (False, True)
    )
    assert few.num_layers < every.num_layers == num_layers
    assert every.temporary_bytes == pytest.approx(few.temporary_bytes, rel=0.05)
    assert every.collectives == few.collectives and every.alias_bytes == few.alias_bytes


@pytest.mark.parametrize("mesh", ["", "tensor:2"])
def test_facts_are_what_was_planned(mesh: str):
    """Arguments to the byte, products but for the chunks that the plan does not expect to end, temporaries nearly."""
    asked = {"model": SMALL | {"vocab_size": 32_768}, "prompt_tokens": 480, "output_tokens": 32, "num_seqs": 8}
    planner = plans.planner("llama_3_2_1b", "h100:2", **asked)
    (found,) = facts.compile_candidates(planner, [plans.candidate(planner.candidate(mesh))])
    for fact in found.steps:
        assert fact.excess_bytes == 0
        assert fact.step.product_flops == pytest.approx(fact.planned_flops, rel=0.1)
    assert found.sampler_bytes is not None
    assert found.planned_temporary_bytes == pytest.approx(found.temporary_bytes, rel=0.2)
