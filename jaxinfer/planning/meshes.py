"""Which meshes there are of so many devices. Host only."""

from collections.abc import Iterator

from jaxinfer.layouts import Layout, mesh_text
from jaxinfer.planning.weight_shapes import ModelWeights
from sharding_rules import axes as ax


def meshes(num_devices: int, axes: tuple[str, ...] = ax.MESH_AXES) -> Iterator[dict[str, int]]:
    """Every mesh of so many devices along some of the axes, without those of size 1."""

    def split(count: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if not axes:
            if count == 1:
                yield {}
            return
        for size in range(1, count + 1):
            if count % size == 0:
                for rest in split(count // size, axes[1:]):
                    yield {axes[0]: size, **rest}

    for sizes in split(num_devices, axes):
        yield {axis: size for axis, size in sizes.items() if size > 1} or {ax.DATA: 1}


def dividing(weights: ModelWeights, num_devices: int, sharding: str) -> list[str]:
    """Of these meshes those over which the model divides: with the most of `tensor` and the fewest axes first."""
    found = [sizes for sizes in meshes(num_devices) if _divides(weights, sizes, sharding)]
    return [mesh_text(sizes) for sizes in sorted(found, key=lambda sizes: (-sizes.get(ax.TENSOR, 1), len(sizes)))]


def _divides(weights: ModelWeights, sizes: dict[str, int], sharding: str) -> bool:
    try:
        weights.on_mesh(Layout.create(mesh_text(sizes), sharding))
    except ValueError:
        return False
    return True
