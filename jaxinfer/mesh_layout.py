"""How a mesh lies over the processes of a job: which of its axes cross them."""

import numpy as np
from jax.sharding import Mesh

from jaxinfer.partitioning import Partitioner, mesh_text
from sharding_rules import axes as ax


def describe(partitioner: Partitioner) -> list[str]:
    """Lines for the user: where each axis goes, and a warning where that is slow."""
    mesh = partitioner.mesh
    assert isinstance(mesh, Mesh)
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
