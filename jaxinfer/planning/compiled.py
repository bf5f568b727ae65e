"""What XLA says of a step that it compiled: its memory, what is multiplied, and what travels between devices.

Of the very program that an engine would run, on the devices of its mesh, which may be those of `target`, or CPUs. There
arguments and collectives are the same, but for sums of bfloat16, which are made in float32; temporaries are another
compiler's. FLOPs are read from the program: XLA itself says nothing of them for GPUs that are not there.
"""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.batch import StepShape
from jaxinfer.planning import hlo, target
from jaxinfer.planning.weight_shapes import LAYERS
from jaxinfer.step_programs import StepPrograms

_LAYER = re.compile(r"/layer_(\d+)/")  # as `Decoder` names them
_POINTER_BYTES = 8  # of each output, which XLA has a table of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Arrays that travel, all alike.

    Attributes:
      op: as XLA calls it: "all-reduce".
      dtype: likewise: "bf16".
      num_bytes: of the result on one device, in one.
      mesh_axes: over which it travels.
      group_size: devices along these.
      in_layers: how many there are in a device's layers.
      outside: how many there are elsewhere.
      is_in_loop: whether that is for each turn of a loop, over a step's tokens or a pipeline's microbatches, or of one
        within a layer. Else it is for a step.
      is_in_branch: whether it is so under a condition only: where a step samples, or on a stage that is unlike others.
    """

    op: str
    dtype: str
    num_bytes: int
    mesh_axes: tuple[str, ...]
    group_size: int
    in_layers: int
    outside: int
    is_in_loop: bool
    is_in_branch: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """Of one program and one device. Where few layers were compiled, the others are added, but to temporaries.

    Temporaries of a GPU do not grow with the layers: each has the memory of the one before it.

    Attributes:
      num_layers: that were compiled.
      argument_bytes: weights, cache, slots and batch.
      output_bytes: of which `alias_bytes` are arguments' memory, of cache and slots.
      temporary_bytes: the most at once of what is neither.
      product_flops: of matrix products, in one turn of a loop over tokens or microbatches, but for those of kernels
        and of loops within a layer. None on CPUs, whose programs do not show them.
      collectives: the largest first.
      lower_seconds, compile_seconds: that it took.
    """

    num_layers: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    product_flops: int | None
    collectives: tuple[Collective, ...]
    lower_seconds: float
    compile_seconds: float


def compile_step(programs: StepPrograms, shape: StepShape, counts: Sequence[int] | None = None) -> CompiledStep:
    """Compiles the program of a shape. Of a model of few layers, `counts` are what `few_layers` says."""
    mesh = programs.definition.partitioner.device_mesh
    counts = (1,) * programs.cache_spec.num_slots if counts is None else counts
    start = time.perf_counter()
    with target.compiling_for(mesh, optimized=False) as options:
        lowered = programs.lowered(shape)
        lowered_at = time.perf_counter()
        compiled = lowered.compile(options)
    compiled_at = time.perf_counter()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    weights, cache, *_ = programs.arguments(shape)
    of_layers = (weight.path.split("/") for weight in programs.definition.weights)
    times_more = [counts[int(path[1])] - 1 if path[0] == LAYERS else 0 for path in of_layers]
    weights_bytes = sum(n * shard_bytes(weight) for n, weight in zip(times_more, weights, strict=True))
    more = [(count - 1, of_slot) for count, of_slot in zip(counts, cache, strict=True)]
    cache_bytes = sum(n * shard_bytes(of_slot) for n, of_slot in more)
    num_arrays = sum(n * len(jax.tree.leaves(of_slot)) for n, of_slot in more)
    return CompiledStep(
        num_layers=programs.definition.config.num_layers,
        argument_bytes=memory.argument_size_in_bytes + weights_bytes + cache_bytes,
        output_bytes=memory.output_size_in_bytes + cache_bytes + _POINTER_BYTES * num_arrays,
        alias_bytes=memory.alias_size_in_bytes + cache_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        product_flops=product_flops(text, counts) if mesh.devices.flat[0].platform == "gpu" else None,
        collectives=_grouped(hlo.collectives(text), mesh, counts),
        lower_seconds=lowered_at - start,
        compile_seconds=compiled_at - lowered_at,
    )


def sampler_bytes(programs: StepPrograms, shape: StepShape) -> int:
    """Of one device, with all options behind a step of one token: the step's logits, and temporaries."""
    mesh, batch = programs.definition.partitioner.device_mesh, programs.batch(shape)
    with target.compiling_for(mesh, optimized=False) as options:
        memory = programs.sampler.sample(batch).lower().compile(options).memory_analysis()
    assert memory is not None
    return shard_bytes(programs.sampler.logits(batch)) + memory.temp_size_in_bytes


def shard_bytes(arrays: Any) -> int:
    """Of a tree of abstract arrays, the bytes of one device."""
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def product_flops(hlo_text: str, counts: Sequence[int]) -> int:
    """Of a program whose slots for layers stand for so many each; see `CompiledStep`."""
    flops = 0
    for product in hlo.products(hlo_text):
        slot = _LAYER.search(product.scope)
        if slot is None:
            flops += product.flops
        elif "/while/" not in product.scope[slot.end() :]:
            flops += counts[int(slot[1])] * product.flops
    return flops


def _grouped(found: list[hlo.Collective], mesh: Mesh, counts: Sequence[int]) -> tuple[Collective, ...]:
    in_layers, outside = collections.Counter(), collections.Counter()
    for one in found:
        devices = one.devices or tuple(range(mesh.size))
        kind = (one.op, one.dtype, one.num_bytes, _axes(devices, mesh), len(devices), one.is_in_loop, one.is_in_branch)
        slot = _LAYER.search(one.scope)
        if slot is None:
            outside[kind] += 1
        else:
            in_layers[kind] += counts[int(slot[1])]
    names = ("op", "dtype", "num_bytes", "mesh_axes", "group_size", "is_in_loop", "is_in_branch")
    kinds = sorted({*in_layers, *outside}, key=lambda kind: (-kind[2], kind))
    return tuple(
        Collective(**dict(zip(names, kind, strict=True)), in_layers=in_layers[kind], outside=outside[kind])
        for kind in kinds
    )


def _axes(devices: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    """Those along which the devices, places in the flattened mesh, differ."""
    places = np.unravel_index(devices, mesh.devices.shape)
    return tuple(axis for axis, along in zip(mesh.axis_names, places, strict=True) if len(set(along.tolist())) > 1)
