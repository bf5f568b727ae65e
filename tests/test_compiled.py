"""What XLA says of a compiled step, and what is added to it for layers that were not compiled."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import models
from jaxinfer.batch import StepShape
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.planning import facts, target
from jaxinfer.planning.compiled import Collective, CompiledStep, compile_step, product_flops, shard_bytes
from jaxinfer.planning.layer_kinds import few_layers
from jaxinfer.planning.programs import planned_programs, widest_shapes
from sharding_rules import axes as ax
from tests import plans
from tests.parity import driver, recipe

SHAPES = driver.Shapes(rows=8, max_len=64, chunk=32, num_steps=4)
DECODE, PREFILL = StepShape(0, 0, 8, 4, 4), StepShape(32, 8, 8, 4, 1)
NOT_OF_ALL = {"num_layers", "temporary_bytes", "lower_seconds", "compile_seconds"}
TINY = {"vocab_size": 512, "embed_dim": 128, "num_layers": 6, "num_q_heads": 8, "num_kv_heads": 2, "mlp_dim": 256}
TINY |= {"head_dim": 32}


def programs(family: str, mesh: str, num_layers: int, *, all_layers: bool, whole: str | None = None) -> Any:
    """With its counts. `whole` is a logical axis that is not split, against the rules."""
    values = {k: v for k, v in recipe.first_config(family).items() if k != "layer_types"}
    config = models.get(family).parse_config(HFConfig(values | {"num_hidden_layers": num_layers}))
    partitioner = Partitioner.create(mesh)
    if whole is not None:
        rules = dataclasses.replace(partitioner.rules, rules={**partitioner.rules.rules, whole: ()})
        partitioner = dataclasses.replace(partitioner, rules=rules)
    few = few_layers(config, partitioner.axis_size(ax.STAGE), all_layers=all_layers)
    definition = ModelDefinition.create(few.config, partitioner, jnp.dtype("float32"))
    return driver.step_programs(definition, SHAPES), few.counts


@functools.cache
def few_of(family: str, mesh: str, num_layers: int, shape: StepShape, whole: str | None = None) -> CompiledStep:
    of_few, counts = programs(family, mesh, num_layers, all_layers=False, whole=whole)
    return compile_step(of_few, shape, counts)


@pytest.mark.parametrize(
    ("family", "mesh", "num_layers", "num_compiled", "shape"),
    [
        ("llama", "data:2,tensor:2", 4, 2, DECODE),
        ("llama", "data:2,tensor:2", 4, 2, PREFILL),
        ("gemma3", "stage:2", 9, 4, PREFILL),
        ("deepseek", "stage:2,expert:2,tensor:2", 7, 4, DECODE),
    ],
)
def test_few_layers_stand_for_all(family: str, mesh: str, num_layers: int, num_compiled: int, shape: StepShape):
    """Of slots that are all alike, that have a window on some stages, and that have experts on some."""
    all_of, _ = programs(family, mesh, num_layers, all_layers=True)
    few, every = few_of(family, mesh, num_layers, shape), compile_step(all_of, shape)
    assert (few.num_layers, every.num_layers) == (num_compiled, num_layers)
    facts = [field.name for field in dataclasses.fields(CompiledStep) if field.name not in NOT_OF_ALL]
    assert {name: getattr(few, name) for name in facts} == {name: getattr(every, name) for name in facts}
    weights, cache, slots, batch = all_of.arguments(shape)
    assert few.argument_bytes == shard_bytes((weights, cache, slots, batch))
    assert few.alias_bytes == shard_bytes((cache, slots))  # nothing is copied
    assert few.temporary_bytes > 0


def large(step: CompiledStep, num_bytes: int) -> list[Collective]:
    return [collective for collective in step.collectives if collective.num_bytes >= num_bytes]


def test_what_travels_in_all_layers():
    step, hidden, logits = few_of("llama", "data:2,tensor:2", 4, DECODE), 8 * 64 * 4, 8 * 128 * 4
    common: dict[str, Any] = {"dtype": "f32", "mesh_axes": ("tensor",), "group_size": 2, "is_in_loop": True}
    gather = Collective(op="all-gather", num_bytes=logits, in_layers=0, outside=1, is_in_branch=True, **common)
    sums = Collective(op="all-reduce", num_bytes=hidden, in_layers=8, outside=1, is_in_branch=False, **common)
    assert large(step, hidden) == [gather, sums]


def test_a_sum_less_is_seen():
    """Of an MLP that is left whole."""
    step, hidden = few_of("llama", "data:2,tensor:2", 4, DECODE, ax.MLP), 8 * 64 * 4
    (sums,) = (collective for collective in large(step, hidden) if collective.op == "all-reduce")
    assert (sums.in_layers, sums.outside) == (4, 1)


def test_what_travels_between_stages_and_for_experts():
    step, hidden = few_of("deepseek", "stage:2,expert:2,tensor:2", 7, DECODE), 4 * 64 * 4
    found = {(c.op, c.mesh_axes, c.is_in_branch): (c.in_layers, c.outside) for c in large(step, hidden) if c.is_in_loop}
    assert found[("collective-permute", ("stage",), False)] == (0, 1)
    assert found[("all-reduce", ("stage",), False)] == (0, 1)
    # In three slots both stages have experts. In the first one has an MLP: there is a condition.
    assert found[("all-to-all", ("expert",), False)] == (2 * 3, 0)
    assert found[("all-to-all", ("expert",), True)] == (2, 0)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama_3_2_1b", ""),
        ("llama_3_2_1b", "tensor:4"),
        ("llama_3_2_1b", "data:2,tensor:2"),
        ("llama_3_2_1b", "stage:4,tensor:2"),
        ("qwen_3_30b_a3b", "expert:2,tensor:2"),
    ],
)
def test_a_plan_says_what_is_compiled(name: str, mesh: str):
    """To the byte: weights, with what pads the stages, and cache. On CPUs, in place of the GPUs of the plan."""
    planner = plans.planner(name, "h100:8", model=TINY, prompt_tokens=96, output_tokens=32, num_seqs=8)
    candidate = plans.candidate(planner.candidate(mesh))
    devices = jax.devices()[: candidate.num_devices]
    of_plan = planned_programs(planner, candidate, devices)
    assert of_plan.programs.backend == "xla"
    shape = widest_shapes(of_plan.programs.buckets)["decode"]
    step, memory = compile_step(of_plan.programs, shape, of_plan.counts), candidate.plan.memory
    of_step = shard_bytes(of_plan.programs.arguments(shape)[2:])
    assert step.argument_bytes == memory.weights_bytes + memory.cache_bytes + of_step


def test_the_widest_shapes():
    buckets = SHAPES.buckets()
    assert widest_shapes(buckets) == {"decode": DECODE, "prefill": PREFILL}


def test_facts_of_several_candidates_in_their_order():
    """Compiled side by side, on CPUs in place of GPUs, whose programs do not show their products."""
    planner = plans.planner("llama_3_2_1b", "h100:2", model=TINY, prompt_tokens=96, output_tokens=32, num_seqs=8)
    candidates = [plans.candidate(planner.candidate(mesh)) for mesh in ("tensor:2", "data:1")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "missing", lambda: "no plugin")
        found = [*facts.compile_candidates(planner, candidates)]
    assert [each.candidate for each in found] == candidates
    for each in found:
        assert [fact.name for fact in each.steps] == ["decode", "prefill"]
        assert all(fact.excess_bytes == 0 and fact.step.product_flops is None for fact in each.steps)
        lines = facts.text(each, TINY["num_layers"]).splitlines()
        assert lines[0] == f"{each.candidate.mesh}, 2 of 6 layers compiled:"
        assert "of arguments (+0 bytes)" in lines[1] and "planned" in lines[-1]
    first, second = found
    assert first.sampler_bytes is not None and second.sampler_bytes is None
    assert first.temporary_bytes >= first.sampler_bytes > 6 * 4 * 9 * TINY["vocab_size"]


def test_products_of_a_layer_count_for_those_like_it_and_loops_within_it_do_not():
    dot = '  %x = f32[4,4]{1,0} dot(%y, %y), lhs_contracting_dims={1}, metadata={op_name="jit(f)/SCOPE/dot_general"}'
    scopes = ("while/body/layer_0/mlp", "layer_1/attention", "layer_1/attention/while/body", "head")
    text = "\n".join(["  %y = f32[4,4]{1,0} parameter(0)", *(dot.replace("SCOPE", scope) for scope in scopes)])
    assert product_flops(text, (10, 100)) == 2 * 4 * 4 * 4 * (10 + 100 + 1)
