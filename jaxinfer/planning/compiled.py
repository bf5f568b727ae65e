"""What XLA says of a step that it compiled: its memory, and what travels between devices.

Of the very programs that an engine would run, on the devices of their mesh, which may be those of `target`. On CPUs
collectives and arguments are the same, but for what XLA sums in another dtype there; temporaries are another
compiler's.
"""

import collections
import dataclasses
import math
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.batch import StepShape
from jaxinfer.parameters import ModelDefinition
from jaxinfer.planning import hlo, target
from jaxinfer.planning.layer_kinds import few_layers
from jaxinfer.step_programs import StepPrograms
from sharding_rules import axes as ax

_POINTER_BYTES = 8  # of an output, which XLA has a table of
# Changes the machine code and nothing that is read here, and takes half of the time.
_QUICK = {"xla_backend_optimization_level": "0"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Arrays of one kind that travel, of a whole model.

    Attributes:
      op: as XLA calls it: "all-reduce".
      dtype: likewise: "bf16".
      num_bytes: of the result on one device.
      mesh_axes: over which it travels.
      group_size: devices along these.
      in_layers: how many there are in all slots for layers of a device, which are its layers.
      outside: how many there are elsewhere.
      is_in_loop: whether that is in each turn of a loop: of the loop over a step's tokens, or a pipeline's ticks, or
        of one within a layer. Else it is once for a step.
      is_in_branch: whether there is a condition: of sampling, or of a stage that others differ from.
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
    """Facts of one program, for one device. Bytes are of the whole model, whatever part of it was compiled.

    Attributes:
      num_layers: that were compiled. Each stands for layers of its kind: their arguments and collectives are added, and
        of temporaries it is known that they do not grow with the layers.
      argument_bytes: weights, cache, slots and batch.
      output_bytes: of which `alias_bytes` are the arguments' own memory: cache and slots.
      temporary_bytes: the most that there are at once, beside arguments and outputs.
      collectives: what travels, the largest first.
      lower_seconds, compile_seconds: that it took.
    """

    num_layers: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    collectives: tuple[Collective, ...]
    lower_seconds: float
    compile_seconds: float


def compile_step(programs: StepPrograms, shape: StepShape, *, all_layers: bool = False) -> CompiledStep:
    """Compiles the program of a shape, with a few of the model's layers (`layer_kinds`) or all."""
    start = time.perf_counter()
    if all_layers:
        few, counts = programs, (1,) * programs.cache_spec.num_slots
    else:
        few, counts = _with_few_layers(programs)
    mesh = programs.definition.partitioner.device_mesh
    with target.compiling_for(mesh) as options:
        lowered = few.lowered(shape)
        lowered_at = time.perf_counter()
        compiled = lowered.compile({**options, **_QUICK})
    seconds = {"lower_seconds": lowered_at - start, "compile_seconds": time.perf_counter() - lowered_at}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    (weights, cache, *_), (few_weights, few_cache, *_) = programs.arguments(shape), few.arguments(shape)
    cache_bytes = shard_bytes(cache) - shard_bytes(few_cache)  # of the layers that were not compiled
    num_arrays = len(jax.tree.leaves(cache)) - len(jax.tree.leaves(few_cache))
    return CompiledStep(
        num_layers=few.definition.config.num_layers,
        argument_bytes=memory.argument_size_in_bytes + shard_bytes(weights) - shard_bytes(few_weights) + cache_bytes,
        output_bytes=memory.output_size_in_bytes + cache_bytes + _POINTER_BYTES * num_arrays,
        alias_bytes=memory.alias_size_in_bytes + cache_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        collectives=_grouped(hlo.collectives(text), mesh, counts),
        **seconds,
    )


def _with_few_layers(programs: StepPrograms) -> tuple[StepPrograms, tuple[int, ...]]:
    """The programs, and how many of the model's slots for layers each of theirs stands for."""
    definition, partitioner = programs.definition, programs.definition.partitioner
    few = few_layers(definition.decoder_config, partitioner.axis_size(ax.STAGE))
    cache_spec = dataclasses.replace(programs.cache_spec, num_slots=len(few.counts))
    definition = ModelDefinition.create(few.config, partitioner, definition.dtype)
    return dataclasses.replace(programs, definition=definition, cache_spec=cache_spec), few.counts


def shard_bytes(arrays: Any) -> int:
    """Of a tree of abstract arrays, the bytes of one device."""
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def _grouped(found: list[hlo.Collective], mesh: Mesh, counts: tuple[int, ...]) -> tuple[Collective, ...]:
    in_layers, outside = collections.Counter(), collections.Counter()
    for one in found:
        devices = one.devices or tuple(range(mesh.size))
        kind = (one.op, one.dtype, one.num_bytes, _axes(devices, mesh), len(devices), one.is_in_loop, one.is_in_branch)
        slot = re.search(r"/layer_(\d+)/", one.scope)  # as `Decoder` names them
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
