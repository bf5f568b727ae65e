"""Compiles for NVIDIA GPUs where there is none, as `jaxinfer.planning.target` does, and reads what their code takes."""

import os
import pathlib
import re
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.planning import target
from jaxinfer.planning.hardware import GPUS

EACH_CAPABILITY = ("a100-80g", "a6000-48g", "l40s", "h100", "b200")
missing = target.missing


def devices(gpu: str, count: int = 1) -> list[jax.Device]:
    """Of one machine."""
    return target.devices(GPUS[gpu], count)


def compile_for(gpu: str, function: Any, *shapes: Any, **options: str) -> jax.stages.Compiled:
    """`function` of arrays of these shapes, trees of `jax.ShapeDtypeStruct`, for one."""
    mesh = Mesh(np.array(devices(gpu)), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    return compile_on(mesh, lambda: jax.jit(function).lower(*arguments), **options)


def compile_on(mesh: Mesh, lower: Callable[[], jax.stages.Lowered], **options: str) -> jax.stages.Compiled:
    """What `lower` lowers, for a mesh of `devices`. `options` are XLA's."""
    with target.compiling_for(mesh) as ours:
        return lower().compile({**ours, **options})


class Resources(NamedTuple):
    """What a kernel takes of a GPU, as NVIDIA's assembler says."""

    registers: int  # of a thread; there are 255
    spilled_bytes: int  # stores of what did not fit into them


def resources(gpu: str, directory: pathlib.Path) -> dict[str, Resources]:
    """Of each kernel whose code XLA left there, as `xla_dump_to` asks it to."""
    major, minor = GPUS[gpu].capability
    architecture = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    found, assembler = {}, target.assembler()
    assert assembler is not None
    for path in directory.glob("*.ptx"):
        if ".entry" not in path.read_text("utf-8"):
            continue
        command = [assembler, "-v", f"-arch={architecture}", path, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for name, spilled, registers in re.findall(_RESOURCES, text, re.DOTALL):
            found[name] = Resources(int(registers), int(spilled))
    return found


_RESOURCES = r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
