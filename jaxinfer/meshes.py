"""Device meshes: how they are spelled, made, and laid out over the processes of a job."""

import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding_rules import axes as ax


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by mesh axis from `"data:2,tensor:4"`; "" means one device.

    >>> parse_mesh("data:2,tensor:4")
    {'data': 2, 'tensor': 4}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"([a-z_]+):(\d+)", part)
        if match is None:
            raise ValueError(f"--mesh={text}: {part!r} is not axis:size, as in --mesh=data:2,tensor:4")
        axis, size = match[1], int(match[2])
        if axis not in ax.MESH_AXES:
            raise ValueError(f"--mesh={text}: unknown mesh axis {axis!r}; known: {', '.join(ax.MESH_AXES)}")
        if axis in sizes:
            raise ValueError(f"--mesh={text}: mesh axis {axis!r} is given twice")
        if size < 1:
            raise ValueError(f"--mesh={text}: axis {axis!r} has size {size}; sizes start at 1")
        sizes[axis] = size
    return sizes


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The spelling that `parse_mesh` reads."""
    return ",".join(f"{axis}:{size}" for axis, size in sizes.items())


def make_mesh(text: str, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that `text` describes, over the first devices that it needs.

    Axes are laid out in the order of `axes.MESH_AXES` whatever the order in `text`, so that `tensor`
    always joins neighbouring devices, those of one process before those of the next. Axis types are Auto: XLA places
    the collectives. Of several processes each must have a part.
    """
    shape = mesh_shape(text)
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id)) if devices is None else devices
    needed = math.prod(shape.values())
    if needed > len(devices):
        platform = devices[0].platform
        hint = f" or --num_cpu_devices={needed}" if platform == "cpu" else ""
        raise ValueError(
            f"--mesh={text} needs {needed} devices, but there are {len(devices)} ({platform}); use a smaller mesh{hint}"
        )
    num_processes = len({device.process_index for device in devices})
    if num_processes > 1 and needed < len(devices):
        raise ValueError(
            f"--mesh={text} uses {needed} of the {len(devices)} devices of {num_processes} processes, and each must "
            f"have a part; give sizes whose product is {len(devices)}"
        )
    grid = np.array(devices[:needed]).reshape(tuple(shape.values()))
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def mesh_shape(text: str) -> dict[str, int]:
    """Sizes by mesh axis, in the order in which axes are laid out."""
    sizes = parse_mesh(text)
    return {axis: sizes[axis] for axis in ax.MESH_AXES if axis in sizes} or {ax.DATA: 1}


def describe(mesh: Mesh) -> list[str]:
    """Lines for the user: which axes cross the processes of a job, and a warning where that is slow."""
    processes = _process_indices(mesh)
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    crosses = {axis: _varies(processes, mesh.axis_names.index(axis)) for axis in sizes}
    places = [f"{axis} {'crosses processes' if crosses[axis] else 'stays inside one'}" for axis in sizes]
    num_processes = len(np.unique(processes))
    each = mesh.size // num_processes
    over = f"{num_processes} processes of {each} {'device' if each == 1 else 'devices'}"
    lines = [f"mesh {mesh_text(sizes)} over {over}: {', '.join(places)}"]
    if crosses.get(ax.TENSOR):
        better = f"tensor:{each} would stay inside one" if each > 1 else "a process can have all devices of a machine"
        lines.append(f"warning: tensor crosses processes, so every layer waits for the link between them; {better}")
    return lines


def _process_indices(mesh: Mesh) -> np.ndarray:
    """Of each device, in the mesh's shape."""
    return np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)


def _varies(values: np.ndarray, axis: int) -> bool:
    return bool((values != values.take([0], axis)).any())
