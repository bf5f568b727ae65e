"""Every family under every sharding strategy, as text that is reviewed in the diff.

After a change of rules or axes: `pytest tests/test_sharding_rules.py --update-golden`, then read the diff.
"""

import pathlib
from collections.abc import Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding_rules
from jaxinfer import kv_cache, models
from jaxinfer.config import EncoderConfig, ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from sharding_rules import RuleSet, rule_set
from sharding_rules import axes as ax

GOLDEN = pathlib.Path(__file__).parent / "golden" / "sharding"
AXIS_SIZES = {ax.DATA: 2, ax.STAGE: 2, ax.EXPERT: 2, ax.CONTEXT: 2, ax.TENSOR: 2}
BESIDE_FIRST = "biases"  # of a family's TINY_CONFIGS, of which the first divides over every mesh

CROSSED = [(family, strategy) for family in models.families() for strategy in sharding_rules.strategies()]


def mesh_of(config: ModelConfig | EncoderConfig) -> str:
    """With every axis by which the model can be split; more devices than there are."""
    axes = (ax.DATA, ax.TENSOR)
    if isinstance(config, ModelConfig):
        axes = [axis for axis in ax.MESH_AXES if axis != ax.EXPERT or config.moe is not None]
    return ",".join(f"{axis}:{AXIS_SIZES[axis]}" for axis in axes)


def describe(name: str, dtype: jnp.dtype, shape: tuple[int, ...], axes: ax.Dimensions, sharding) -> str:
    sizes, shard = (",".join(map(str, dims)) for dims in (shape, sharding.shard_shape(shape)))
    names, split = (", ".join(map(str, entries)) for entries in (axes, sharding.spec))
    return f"{name}  {dtype}[{sizes}]  ({names})  ({split})  shard [{shard}]"


def describe_model(family: str, strategy: str) -> str:
    """One line per parameter and cache array: shape, logical axes, mesh axes, shape on one device."""
    tiny_configs = models.get(family).TINY_CONFIGS
    first = next(iter(tiny_configs))
    partitioner = Partitioner.abstract(
        mesh_of(models.get(family).parse_config(HFConfig(tiny_configs[first]))), strategy
    )
    lines = [f"mesh {dict(partitioner.mesh.shape)}"]
    for config_name in [first, *({BESIDE_FIRST} & tiny_configs.keys())]:
        config = models.get(family).parse_config(HFConfig(tiny_configs[config_name]))
        lines += ["", f"== {config_name}"]
        for weight in ModelDefinition.create(config, partitioner, jnp.dtype("float32")).weights:
            lines.append(describe(weight.path, weight.dtype, weight.shape, weight.axes, weight.sharding))
        if isinstance(config, ModelConfig):
            lines += describe_cache(config, partitioner)
    return "\n".join(lines) + "\n"


def describe_cache(config: ModelConfig, partitioner: Partitioner) -> Iterator[str]:
    pages = {"pages_per_shard": 8 * partitioner.context_size, "page_size": 16}
    cache = kv_cache.cache_spec(config, partitioner, **pages, dtype=jnp.dtype("float32"))
    sharding = kv_cache.cache_sharding(cache, partitioner)
    for slot in range(cache.num_slots):
        for array in ("k", "v") if cache.has_values else ("k",):
            yield describe(f"cache/{slot}/{array}", cache.dtype, cache.shape, cache.axes, sharding)


@pytest.mark.parametrize(("family", "strategy"), CROSSED)
def test_matches_golden_text(family: str, strategy: str, update_golden: bool):
    text, golden = describe_model(family, strategy), GOLDEN / f"{family}__{strategy}.txt"
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.exists(), f"{golden}: missing; make it with --update-golden"
    assert text == golden.read_text()


def test_golden_has_no_leftovers():
    expected = {f"{family}__{strategy}.txt" for family, strategy in CROSSED}
    assert {file.name for file in GOLDEN.iterdir()} == expected


@pytest.mark.parametrize("strategy", sharding_rules.strategies())
def test_strategy_has_its_files_name_and_leaves_no_axis_idle(strategy: str):
    rules = sharding_rules.get(strategy)
    assert rules.name == strategy
    assert rules.mesh_axes == ax.MESH_AXES


def test_arrays_are_created_as_the_text_says():
    """The text is derived from shardings; this looks at real arrays once."""
    config = models.get("llama").parse_config(HFConfig(models.get("llama").TINY_CONFIGS["gqa"]))
    partitioner = Partitioner.create("data:2,tensor:4")
    definition = ModelDefinition.create(config, partitioner, jnp.dtype("float32"))
    shards = {
        spec.path: array.addressable_shards[0].data.shape
        for spec, array in zip(definition.params, definition.init(), strict=True)
    }
    assert shards["layers/0/attention/q/weight"] == (2, 16, 64)
    assert shards["layers/0/attention/k/weight"] == (1, 16, 64)
    assert shards["layers/1/mlp/down/weight"] == (64, 24)
    assert shards["embedding/table"] == (32, 64)
    assert shards["norm/scale"] == (64,)


@pytest.mark.parametrize(("mesh", "repeats"), [("tensor:8", 4), ("data:2,tensor:4", 2)])
def test_random_weights_are_one_model_on_every_mesh(mesh: str, repeats: int):
    """Two KV heads: the copies of one, which stand for it on several devices, once were random each."""
    config = models.get("llama").parse_config(HFConfig(models.get("llama").TINY_CONFIGS["biases"]))
    alone = ModelDefinition.create(config, Partitioner.create(), jnp.dtype("float32")).init(seed=3)
    definition = ModelDefinition.create(config, Partitioner.create(mesh), jnp.dtype("float32"))
    for spec, array, whole in zip(definition.params, definition.init(seed=3), alone, strict=True):
        copies = repeats if ax.KV_HEADS in spec.axes else 1
        assert array.sharding == spec.sharding
        np.testing.assert_array_equal(array, np.repeat(whole, copies, axis=0), spec.path)


def test_unknown_strategy_lists_the_known():
    with pytest.raises(
        ValueError, match=r"--sharding=tensr: unknown sharding strategy; known: expert_sums, inference$"
    ):
        sharding_rules.get("tensr")


def test_rule_set_refuses_omission():
    with pytest.raises(ValueError, match=r"'partial' has no rule for \['layers', 'embed', .*'pages'\]"):
        RuleSet("partial", {ax.HEADS: (ax.TENSOR,)})


def test_rule_set_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"'typo' names unknown logical axes \['head'\]; known: .*'heads'"):
        rule_set("typo", head="tensor")
    with pytest.raises(ValueError, match=r"'typo' names unknown mesh axes \['tensr'\]; known: .*'tensor'"):
        rule_set("typo", heads="tensr")


def test_rule_sets_cannot_change_and_can_be_hashed():
    rules = sharding_rules.get("inference")
    with pytest.raises(TypeError):
        cast(dict, rules.rules)[ax.HEADS] = ()
    assert len({rules, sharding_rules.get("inference"), sharding_rules.get("expert_sums")}) == 2
    assert jax.jit(lambda x, rules: x, static_argnums=1)(1, rules) == 1
