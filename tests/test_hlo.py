"""Collectives as XLA writes them: in programs whose collectives are known, and in lines from programs for GPUs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxinfer.planning import hlo

AXES = ("data", "stage", "tensor")  # of two devices each
Function = Callable[[jax.Array], Any]


def found(function: Function) -> list[hlo.Collective]:
    """In the program of a function of float32 [8, 16] on each of eight devices."""
    mesh = jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    spec = PartitionSpec(AXES)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return hlo.collectives(jax.jit(mapped).lower(jnp.zeros((64, 16))).compile().as_text() or "")


def total(x: jax.Array) -> jax.Array:
    return lax.psum(x, "tensor")


@pytest.mark.parametrize(
    ("function", "op", "num_elements", "devices"),
    [
        (total, "all-reduce", 128, (0, 1)),
        (lambda x: lax.psum(x, ("data", "tensor")), "all-reduce", 128, (0, 1, 4, 5)),
        (lambda x: lax.psum(x, AXES), "all-reduce", 128, (0, 1, 2, 3, 4, 5, 6, 7)),
        (lambda x: lax.all_gather(x, "stage"), "all-gather", 256, (0, 2)),
        (lambda x: lax.all_gather(x, ("data", "stage")), "all-gather", 512, (0, 2, 4, 6)),
        (lambda x: lax.all_to_all(x, ("stage", "tensor"), 0, 0, tiled=True), "all-to-all", 128, (0, 1, 2, 3)),
        (lambda x: lax.psum_scatter(x, "tensor", tiled=True), "reduce-scatter", 64, (0, 1)),
        (lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]), "collective-permute", 128, (0, 4)),
        (lambda x: lax.ppermute(x, ("data", "stage"), [(0, 2), (2, 1)]), "collective-permute", 128, (0, 4, 2)),
    ],
)
def test_what_travels_and_between_which_devices(
    function: Function, op: str, num_elements: int, devices: tuple[int, ...]
):
    (one,) = found(function)
    assert (one.op, one.dtype, one.num_elements, one.num_bytes) == (op, "f32", num_elements, 4 * num_elements)
    assert one.devices == devices and not one.is_in_loop and not one.is_in_branch


def test_bytes_by_dtype():
    (one,) = found(lambda x: lax.all_gather(x > 0, "tensor"))
    assert (one.dtype, one.num_elements, one.num_bytes) == ("pred", 256, 256)
    lines = "\n".join(f"  %x{i} = {dtype}[3,5] all-reduce(%y), replica_groups={{}}" for i, dtype in enumerate(_SIZES))
    assert {one.dtype: one.num_bytes for one in hlo.collectives(lines)} == _SIZES


_SIZES = {"f64": 120, "bf16": 30, "s32": 60, "f8e4m3fn": 15, "s4": 8}


@pytest.mark.parametrize(
    ("function", "is_in_loop", "is_in_branch"),
    [
        (lambda x: lax.fori_loop(0, 3, lambda i, y: total(y * 2 + i), x), True, False),
        (lambda x: lax.cond(x[0, 0] > 0, total, lambda y: y, x), False, True),
        (lambda x: lax.fori_loop(0, 3, lambda i, y: lax.cond(y[0, 0] > i, total, jnp.sin, y), x), True, True),
    ],
    ids=["loop", "branch", "branch in a loop"],
)
def test_loops_and_branches(function: Function, is_in_loop: bool, is_in_branch: bool):
    (one,) = found(function)
    assert (one.is_in_loop, one.is_in_branch) == (is_in_loop, is_in_branch)


def test_scopes_are_those_of_the_code():
    """Of a program that no other test has: JAX's cache on disk knows programs without their scopes."""
    (one,) = found(jax.named_scope("layer_3")(lambda x: total(3 * x)))
    assert "/layer_3/" in one.scope


def test_a_second_sum_is_seen():
    """Though XLA makes one operation of both."""
    counted = found(lambda x: total(x) + jnp.sum(total(2 * x[0])))
    assert [(one.op, one.num_elements) for one in counted] == [("all-reduce", 128), ("all-reduce", 16)]


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("{}", ()),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("mesh['tensor'=4] {'tensor'}", (0, 1, 2, 3)),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=2] {'axis_0'}", (0, 2)),
        ("mesh['stage'=2,'expert'=2,'tensor'=2] {'stage','tensor'}", (0, 1, 4, 5)),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_1'}", (0, 1, 4, 5)),
    ],
)
def test_every_way_in_which_devices_are_written(groups: str, devices: tuple[int, ...]):
    line = f"  %x = f32[4]{{0}} all-reduce(%y), channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    (one,) = hlo.collectives(line)
    assert one.devices == devices


@pytest.mark.parametrize("groups", ["mesh['a'=4] {'a':(2)2}", "mesh['a'=2], device_ids=(1,0) {'a'}", "[2,2]", "x"])
def test_devices_in_words_that_are_not_known(groups: str):
    with pytest.raises(ValueError, match="not known"):
        hlo.collectives(f"  %x = f32[4]{{0}} all-reduce(%y), replica_groups={groups}, to_apply=%add")


@pytest.mark.parametrize(
    ("op", "started", "done", "arrays"),
    [
        ("all-reduce", "f32[4]{0}", "f32[4]{0}", [("f32", 4)]),  # jax 0.10
        ("all-reduce", "((f32[4]{0}), f32[4]{0})", "f32[4]{0}", [("f32", 4)]),  # jax 0.12
        ("all-gather", "(s32[1,8]{1,0}, s32[4,8]{1,0})", "s32[4,8]{1,0}", [("s32", 32)]),
        ("all-gather", "((s32[8], f32[9]), (s32[16], f32[18]))", "(s32[16], f32[18])", [("s32", 16), ("f32", 18)]),
        ("all-to-all", "((f32[2,8]{1,0}), f32[2,8]{1,0})", "f32[2,8]{1,0}", [("f32", 16)]),
        ("collective-permute", "(f32[1,4]{1,0}, f32[1,4]{1,0}, u32[], u32[])", "f32[1,4]{1,0}", [("f32", 4)]),
    ],
)
def test_what_is_started_and_done_later_counts_once(op: str, started: str, done: str, arrays: list[tuple[str, int]]):
    """The result is that of the end: the start has what is given, too."""
    text = (
        f"  %a.1 = {started} {op}-start(%y), channel_id=1, replica_groups=[2,2]<=[4], use_global_device_ids=true\n"
        f"  ROOT %b = {done} {op}-done(%a.1), backend_config={{}}\n"
    )
    assert [(one.dtype, one.num_elements) for one in hlo.collectives(text)] == arrays


def test_a_result_in_pieces_from_each_device_is_one():
    text = "  %x = (f32[1,4]{1,0}, f32[1,4]{1,0}) all-to-all(%y, %z), replica_groups={{0,1}}, channel_id=1"
    (one,) = hlo.collectives(text)
    assert one.num_elements == 8


GPU_PRODUCTS = """
%gemm_computation (parameter_0: bf16[256,8,128], parameter_1: bf16[1024,64]) -> f32[8,256,64] {
  %parameter_0 = bf16[256,8,128]{2,1,0} parameter(0)
  %parameter_1 = bf16[8,128,64]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[8,256,64]{2,1,0} dot(%parameter_0, %parameter_1), lhs_batch_dims={1}, lhs_contracting_dims={2}, \
rhs_batch_dims={0}, rhs_contracting_dims={1}, metadata={op_name="jit(decode)/while/body/layer_3/mlp/dot_general"}
}

ENTRY %main (a: f32[16,32], b: f32[32,8]) -> f32[16,8] {
  %a = f32[16,32]{1,0} parameter(0)
  %b = f32[32,8]{1,0} parameter(1)
  %parameter_0 = f32[2]{0} constant({1, 2})
  %kernel = f32[16,8]{1,0} custom-call(%a, %b), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %gemm = (f32[16,8]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}
}
"""


def test_products_of_tensor_cores_and_of_cublas():
    """Names are those of a computation; a kernel's products are its own."""
    of_layer, of_call = hlo.products(GPU_PRODUCTS)
    assert of_layer == hlo.Product(2 * 8 * 256 * 64 * 128, "jit(decode)/while/body/layer_3/mlp/dot_general")
    assert of_call == hlo.Product(2 * 16 * 8 * 32, "")
