"""A mixture of experts against NumPy in float64, one token at a time."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sharding_rules
from jaxinfer import models
from jaxinfer.config import ModelConfig, MoEConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.layers.experts import GatedExperts
from jaxinfer.layers.moe import MoE, Router, Routing
from jaxinfer.meshes import make_mesh
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from pallas_kernels.grouped_matmul import backends
from sharding_rules import rule_set
from tests.long_campaign import chosen

FLOAT32 = {"dtype": jnp.dtype("float32"), "rngs": nnx.Rngs(0)}


def config(**moe: Any) -> ModelConfig:
    mixtral = models.get("mixtral")
    parsed = mixtral.parse_config(HFConfig(mixtral.TINY_CONFIGS["gqa"]))
    return dataclasses.replace(parsed, moe=dataclasses.replace(parsed.moe, **moe))


CONFIGS = {"gated": config(), "clamped": config(swiglu_limit=2.0, swiglu_alpha=1.3)}


MESHES = ("", "expert:1,tensor:1", "expert:4", "expert:2,tensor:2", "data:2,expert:2,tensor:2")
PLACEMENTS = {"once": tuple(range(8)), "copies": (7, 0, 1, 2, 3, 4, 5, 6, 0, 0, 7, 3)}


def placed(config: ModelConfig, slots: tuple[int, ...], backend: str = "xla") -> ModelConfig:
    """In layer 0."""
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, placements=(slots,), backend=backend))


def make_moe(config: ModelConfig, partitioner: Partitioner) -> MoE:
    moe = MoE(config, (0,), partitioner, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    return nnx.merge(*_random(nnx.split(moe)))


def _random(split):
    """So large that experts differ, and the router picks; biases, too, which are zero at first."""
    graph, state = split
    rng = np.random.default_rng(0)
    return graph, jax.tree.map(lambda a: jnp.asarray(0.2 * rng.standard_normal(a.shape), a.dtype), state)


def expected(moe: MoE, x: np.ndarray) -> np.ndarray:
    """Token by token, expert by expert."""
    experts, weights = (np.asarray(a) for a in moe.router(jnp.asarray(x)))
    of_expert = gated if isinstance(moe.experts, GatedExperts) else clamped
    params = {key: np.asarray(value[...], np.float64) for key, value in nnx.state(moe.experts, nnx.Param).items()}
    out = np.zeros(x.shape)
    for place in np.ndindex(experts.shape):
        token, one = x[place[:-1]].astype(np.float64), {key: value[experts[place]] for key, value in params.items()}
        out[place[:-1]] += weights[place] * of_expert(token, **one)
    return out


def gated(token: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gated = gate @ token
    return down @ (gated / (1 + np.exp(-gated)) * (up @ token))


def clamped(
    token: np.ndarray, gate_up: np.ndarray, gate_up_bias: np.ndarray, down: np.ndarray, down_bias: np.ndarray
) -> np.ndarray:
    gate, up = (gate_up @ token + gate_up_bias).T
    assert gate.max() > 2 and np.abs(up).max() > 2
    gate, up = np.minimum(gate, 2), np.clip(up, -2, 2)
    return down @ (gate / (1 + np.exp(-1.3 * gate)) * (up + 1)) + down_bias


@pytest.mark.parametrize(
    ("kind", "mesh", "rules", "placement", "backend"),
    chosen(
        [*itertools.product(CONFIGS, MESHES, sharding_rules.strategies(), PLACEMENTS, backends())],
        ("gated", "", "inference", "once", "xla"),
        ("clamped", "", "inference", "copies", "xla"),
        ("clamped", "expert:4", "inference", "once", "xla"),
        ("gated", "data:2,expert:2,tensor:2", "inference", "copies", "xla"),
        ("clamped", "expert:2,tensor:2", "expert_sums", "copies", "xla"),
        ("gated", "", "inference", "once", "triton"),
        ("gated", "data:2,expert:2,tensor:2", "inference", "copies", "triton"),
        ("clamped", "expert:2,tensor:2", "expert_sums", "copies", "triton"),
    ),
)
def test_experts_on_meshes(kind: str, mesh: str, rules: str, placement: str, backend: str):
    """Each device computes its experts for tokens of its own or of others, whichever rules split them: none is dropped.

    Nor is any changed where experts are in several slots. Tokens that are not valid get nothing.
    """
    config, slots = CONFIGS[kind], PLACEMENTS[placement]
    moe = make_moe(config, Partitioner.create())
    x = np.random.default_rng(0).standard_normal((4, 9, 64)).astype(np.float32)
    x[:, 4:] = x[:, 3:4]  # of many tokens the same experts
    is_valid = np.ones(x.shape[:2], bool)
    is_valid[0, 2], is_valid[1] = False, False
    exact = np.where(is_valid[..., None], expected(moe, x), 0)
    on_mesh = MoE(placed(config, slots, backend), (0,), Partitioner.create(mesh, rules), **FLOAT32)
    for name, whole in nnx.state(moe.experts, nnx.Param).items():
        once = whole[...]
        getattr(on_mesh.experts, name)[...] = once[jnp.array(slots)]
    for name, whole in nnx.state(moe.router, nnx.Param).items():
        getattr(on_mesh.router, name)[...] = whole[...]
    routing = Routing(jnp.asarray(is_valid), num_experts=8)
    out = jax.jit(lambda x: on_mesh(x, routing))(x)
    assert np.abs(out - exact).max() < 1e-5 * np.abs(exact).max()


def test_the_tokens_of_an_expert_in_several_slots_take_turns():
    """By their places, so that a token's slot does not depend on the others; and by data shards, which may have one."""
    experts = MoE(placed(CONFIGS["gated"], PLACEMENTS["copies"]), (0,), Partitioner.create(), **FLOAT32).experts
    picked = np.array([[0, 1], [0, 7], [5, 0], [7, 0]])
    slots = np.asarray(experts._slots(jnp.asarray(np.stack([picked, picked]))))
    np.testing.assert_array_equal(slots, [[[1, 2], [8, 10], [6, 9], [10, 1]], [[8, 2], [9, 0], [6, 1], [0, 8]]])


def test_rules_that_split_tokens_over_a_part_of_the_experts_devices_are_refused():
    """Some tokens would have to travel, and some sums to be added."""
    rules = rule_set("halves", batch="data", experts=("data", "expert"))
    needs = r"'halves' splits experts over \('data', 'expert'\) and batch over \('data',\), so over a part of them"
    with pytest.raises(ValueError, match=needs):
        make_moe(CONFIGS["gated"], Partitioner(make_mesh("data:2,expert:2"), rules))


def route(x: np.ndarray, **moe: Any) -> tuple[np.ndarray, np.ndarray, Router]:
    router = Router(
        MoEConfig(num_experts_per_token=3, mlp_dim=8, **moe),
        64,
        Partitioner.create(),
        dtype=jnp.dtype("float32"),
        rngs=nnx.Rngs(1),
    )
    if router.choice_bias is not None:
        router.choice_bias[...] = jnp.asarray(np.random.default_rng(2).standard_normal(12), jnp.float32)
    experts, weights = router(jnp.asarray(x))
    return np.asarray(experts), np.asarray(weights), router


@pytest.mark.parametrize("scores_of_group", [1, 2])
def test_experts_of_the_best_groups_only(scores_of_group: int):
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32) * 20
    groups = {"num_groups": 4, "groups_per_token": 2, "experts_per_group_score": scores_of_group}
    experts, weights, router = route(x, num_experts=12, scoring="sigmoid", choice_bias=True, scale=2.5, **groups)
    assert router.choice_bias is not None
    scores = 1 / (1 + np.exp(-(x @ np.asarray(router.weight[...]).T)))
    choice = (scores + np.asarray(router.choice_bias[...])).reshape(50, 4, 3)
    of_groups = np.sort(choice, axis=-1)[..., -scores_of_group:].sum(-1)
    for token in range(50):
        best = np.argsort(of_groups[token])[-2:]
        legal = [3 * group + i for group in best for i in range(3)]
        picked = sorted(legal, key=lambda expert: -choice[token].reshape(-1)[expert])[:3]
        assert set(experts[token]) == set(picked)
        of_picked = scores[token, experts[token]]
        np.testing.assert_allclose(weights[token], 2.5 * of_picked / of_picked.sum(), rtol=1e-5)


def test_groups_must_fit():
    with pytest.raises(ValueError, match="12 experts do not divide into 5 groups"):
        MoEConfig(num_experts=12, num_experts_per_token=3, mlp_dim=8, num_groups=5)
    with pytest.raises(ValueError, match="num_experts_per_tok is 4; a token's groups have 3"):
        MoEConfig(num_experts=12, num_experts_per_token=4, mlp_dim=8, num_groups=4)
    needs = "12 groups of 1 experts; a token needs 2 groups, and a group's score 2 experts"
    with pytest.raises(ValueError, match=needs):
        MoEConfig(
            num_experts=12,
            num_experts_per_token=2,
            mlp_dim=8,
            num_groups=12,
            groups_per_token=2,
            experts_per_group_score=2,
        )


def test_scores_that_are_all_zero_weigh_nothing():
    """And are not divided by their sum."""
    router = Router(
        MoEConfig(num_experts=4, num_experts_per_token=2, mlp_dim=8, scoring="sigmoid"),
        2,
        Partitioner.create(),
        **FLOAT32,
    )
    router.weight[...] = jnp.full((4, 2), -100.0)
    np.testing.assert_array_equal(router(jnp.ones((1, 2)))[1], 0)


def test_the_bias_on_the_choice_of_experts_is_never_rounded():
    """In bfloat16 it would pick other experts."""
    deepseek = models.get("deepseek")
    config = deepseek.parse_config(HFConfig(deepseek.TINY_CONFIGS["gqa"]))
    params = ModelDefinition.create(config, Partitioner.create(), jnp.dtype("bfloat16")).params
    kept = {spec.path for spec in params if spec.dtype != jnp.bfloat16}
    assert kept == {f"layers/{layer}/mlp/router/choice_bias" for layer in (1, 2)}
