"""Device meshes: how they are made, and laid out over the machines of a job."""

import collections
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxinfer.layouts import mesh_shape, mesh_text
from sharding_rules import axes as ax


def make_mesh(text: str, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that `text` describes, over the first of `devices`, or of `ordered(jax.devices())`.

    Axes are laid out in the order of `axes.MESH_AXES` whatever the order in `text`, so that `tensor` always joins
    neighbouring devices. Axis types are Auto: XLA places the collectives. Of several processes each must have a part,
    and as many devices as any other.
    """
    shape = mesh_shape(text)
    devices = ordered(jax.devices()) if devices is None else devices
    needed = math.prod(shape.values())
    each = collections.Counter(device.process_index for device in devices)
    if len(set(each.values())) > 1:
        counts = ", ".join(f"{count} in process {index}" for index, count in sorted(each.items()))
        raise ValueError(f"processes must have the same number of devices, and there are {counts}")
    if needed > len(devices):
        platform = devices[0].platform
        hint = f" or --num_cpu_devices={needed // len(each)}" if platform == "cpu" and needed % len(each) == 0 else ""
        raise ValueError(
            f"--mesh={text} needs {needed} devices, but there are {len(devices)} ({platform}); use a smaller mesh{hint}"
        )
    if len(each) > 1 and needed < len(devices):
        raise ValueError(
            f"--mesh={text} uses {needed} of the {len(devices)} devices of {len(each)} processes, and each must "
            f"have a part; give sizes whose product is {len(devices)}"
        )
    grid = np.array(devices[:needed]).reshape(tuple(shape.values()))
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def ordered(devices: Iterable[jax.Device], machines: Sequence[str] | None = None) -> list[jax.Device]:
    """Those of one machine before those of the next, and so those of one process.

    `machines` has the name of each process' machine; None is one for all.
    """

    def place(device: jax.Device) -> tuple[int, int, int]:
        first_there = machines.index(machines[device.process_index]) if machines else 0
        return first_there, device.process_index, device.id

    return sorted(devices, key=place)


def describe(mesh: Mesh, machines: Sequence[str]) -> list[str]:
    """Lines for the user: which axes cross the machines of a job, and a warning where that is slow.

    `machines` has the name of each process' machine.
    """
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    places = np.vectorize(lambda index: machines.index(machines[index]), otypes=[int])(processes)
    num_processes, (_, each) = len(np.unique(processes)), np.unique(places, return_counts=True)
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    crosses = {axis: _varies(places, mesh.axis_names.index(axis)) for axis in sizes}
    over = f"{num_processes} processes of {_counted(mesh.size // num_processes, 'device')}"
    lines = [f"mesh {mesh_text(sizes)} over {over} on {_counted(len(each), 'machine')}"]
    if len(each) > 1:
        told = [f"{axis} {'crosses machines' if crosses[axis] else 'stays inside one'}" for axis in sizes]
        lines[0] += f": {', '.join(told)}"
    if crosses.get(ax.TENSOR):
        inside = math.gcd(*map(int, each), sizes[ax.TENSOR])
        better = f"; tensor:{inside} would stay inside one" if inside > 1 else ""
        lines.append(f"warning: tensor crosses machines, so every layer waits for the link between them{better}")
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _varies(values: np.ndarray, axis: int) -> bool:
    return bool((values != values.take([0], axis)).any())
