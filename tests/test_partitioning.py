"""Logical names to shardings, and each refusal: what is wrong, where, and what would do."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec

import sharding_rules
from jaxinfer.layouts import num_sharded_kv_heads, parse_mesh
from jaxinfer.meshes import make_mesh
from jaxinfer.partitioning import Partitioner
from sharding_rules import axes as ax
from sharding_rules import rule_set


def test_parses_meshes():
    assert parse_mesh("data:2, tensor:4") == {"data": 2, "tensor": 4}
    assert parse_mesh("") == {}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensr:4", "--mesh=tensr:4: unknown mesh axis 'tensr'; known: data, stage, expert, context, tensor"),
        ("tensor:2,tensor:4", "mesh axis 'tensor' is given twice"),
        ("data:2,tensor:0", "axis 'tensor' has size 0; sizes start at 1"),
        ("tensor=4", "'tensor=4' is not axis:size, as in --mesh=data:2,tensor:4"),
        ("tensor:-4", "'tensor:-4' is not axis:size"),
        ("8", "'8' is not axis:size"),
    ],
)
def test_refuses_meshes(mesh: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_mesh(mesh)


def test_mesh_axes_have_one_order():
    assert make_mesh("tensor:4,data:2").shape == {"data": 2, "tensor": 4}
    assert list(make_mesh("tensor:4,data:2").shape) == ["data", "tensor"]
    assert make_mesh("").size == 1


def test_mesh_of_more_devices_than_there_are():
    message = "--mesh=tensor:16 needs 16 devices, but there are 8 (cpu); use a smaller mesh or --num_cpu_devices=16"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh("tensor:16")


def test_spec_names_mesh_axes():
    partitioner = Partitioner.create("data:2,tensor:4")
    assert partitioner.spec((ax.HEADS, ax.HEAD_DIM, ax.EMBED)) == PartitionSpec("tensor", None, None)
    assert partitioner.spec((ax.BATCH, None)) == PartitionSpec("data", None)
    assert (partitioner.num_shards(ax.HEADS), partitioner.num_shards(ax.EMBED)) == (4, 1)
    assert (partitioner.axis_size("tensor"), partitioner.axis_size("context")) == (4, 1)


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [("data:2,tensor:2", ()), ("data:2,context:2", ("context",)), ("context:1,tensor:2", ()), ("expert:2", ())],
)
def test_pages_of_a_sequence_are_over_what_splits_pages_and_not_sequences(mesh: str, axes: tuple[str, ...]):
    partitioner = Partitioner.create(mesh)
    assert (partitioner.context_axes, partitioner.context_size) == (axes, 2 ** len(axes))


@pytest.mark.parametrize("pages", ["context", ("context", "data"), ()], ids=str)
def test_a_sequences_pages_on_others_devices_are_refused(pages: str | tuple[str, ...]):
    partitioner = Partitioner(make_mesh("data:2,context:2"), rule_set("astray", batch="data", pages=pages))
    with pytest.raises(
        ValueError, match=r"'astray' splits batch over \('data',\) .*; let pages begin with \('data',\)"
    ):
        _ = partitioner.context_size


def test_one_axis_over_two_mesh_axes():
    rules = rule_set("wide", vocab=("data", "tensor"))
    partitioner = Partitioner(make_mesh("data:2,tensor:4"), rules)
    sharding = partitioner.sharding((ax.VOCAB, ax.EMBED), (16, 3))
    assert sharding.spec == PartitionSpec(("data", "tensor"), None)
    assert sharding.shard_shape((16, 3)) == (2, 3)


def test_unknown_axis_name():
    with pytest.raises(ValueError, match=r"no sharding rule for logical axis \['embeded'\]; known: \[.*'embed'"):
        Partitioner.create("tensor:4").spec(("embeded", ax.MLP))


def test_mesh_axis_used_twice():
    with pytest.raises(ValueError, match=r"\('heads', 'mlp'\): strategy 'inference' .* mesh axis \['tensor'\]"):
        Partitioner.create("tensor:4").spec((ax.HEADS, ax.MLP))


def test_indivisible_dimension():
    message = "lm_head: vocab 130 does not divide over --mesh tensor:4 (4 devices); sizes that would do: 1, 2"
    with pytest.raises(ValueError, match=re.escape(message)):
        Partitioner.create("tensor:4").sharding((ax.VOCAB, ax.EMBED), (130, 64), "lm_head")


def test_wrong_number_of_axes():
    with pytest.raises(ValueError, match=re.escape("bias: 1 dimensions (64,) but 2 axis names ('mlp', 'embed')")):
        Partitioner.create("tensor:4").sharding((ax.MLP, ax.EMBED), (64,), "bias")


@pytest.mark.parametrize("mesh", ["", "tensor:4", "data:2,stage:2,tensor:2", "expert:2,context:2"])
def test_auto_is_the_table_for_inference(mesh: str):
    assert Partitioner.create(mesh).rules is sharding_rules.get("inference")


def test_strategy_that_leaves_an_axis_idle(monkeypatch: pytest.MonkeyPatch):
    others = {"by_heads": rule_set("by_heads", heads="tensor"), "whole": rule_set("whole")}
    monkeypatch.setattr(sharding_rules, "get", others.get)
    message = "--sharding=by_heads leaves the mesh axes ['data'] of --mesh=data:2,tensor:4 idle"
    with pytest.raises(ValueError, match=re.escape(message) + r"; it splits over \['tensor'\], or use --sharding=auto"):
        Partitioner.create("data:2,tensor:4", "by_heads")
    with pytest.raises(ValueError, match=r"splits over nothing"):
        Partitioner.create("tensor:2", "whole")


@pytest.mark.parametrize(
    ("mesh", "heads"), [("", 2), ("tensor:2", 2), ("tensor:4", 4), ("tensor:8", 8), ("data:2,tensor:4", 4)]
)
def test_kv_heads_are_repeated_over_groups(mesh: str, heads: int):
    assert num_sharded_kv_heads(2, Partitioner.create(mesh)) == heads


def test_kv_heads_that_do_not_fit():
    message = (
        "kv_heads 6 neither divides nor is divided by the 4 devices of --mesh tensor:4; sizes that would do: 1, 2, 3"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        num_sharded_kv_heads(6, Partitioner.create("tensor:4"))


def test_constrain_places_the_array():
    partitioner = Partitioner.create("tensor:4")
    x = jax.jit(lambda: partitioner.constrain(jax.numpy.zeros((2, 8)), (ax.BATCH, ax.MLP)))()
    assert x.sharding.shard_shape(x.shape) == (2, 2)
    assert Partitioner.create("").constrain(x, (ax.BATCH, ax.MLP)) is x


@pytest.mark.parametrize(
    ("mesh", "size", "expected"),
    [
        ("stage:2,tensor:4", 32000, ("stage", "tensor")),
        ("stage:3,tensor:4", 32000, ("tensor",)),
        ("stage:2,context:3", 32000, ("stage",)),
        ("stage:4,context:2,tensor:3", 12, ("stage", "tensor")),
        ("stage:2,tensor:2", 50257, ()),
    ],
)
def test_a_size_is_split_over_the_axes_that_it_divides_over(mesh: str, size: int, expected: tuple[str, ...]):
    partitioner = Partitioner.abstract(mesh).fitted(ax.VOCAB, size)
    assert partitioner.mesh_axes(ax.VOCAB) == expected
    assert partitioner.mesh_axes(ax.MLP) == Partitioner.abstract(mesh).mesh_axes(ax.MLP)
