"""Weights as an Orbax checkpoint: written one at a time, restored straight into any sharding.

The tree is the model's own: `layers/0/mlp/up/weight` is the leaf "weight" of "up" of "mlp"... Each leaf has the
parameter's shape, [heads, head_dim, embed] and the like, every KV head and every expert once.
"""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from jaxinfer.checkpoint.groups import groups
from jaxinfer.checkpoint.manifest import ORBAX_DIRECTORY
from jaxinfer.param_specs import ParamSpec
from jaxinfer.parameters import ModelDefinition
from sharding_rules import axes as ax

_CHUNK_BYTES = 1 << 20  # before compression
_ONE_PER_CHUNK = (ax.HEADS, ax.KV_HEADS, ax.EXPERTS)
_GROUP_BYTES = 1 << 28  # restored by one call, whose overhead would else be most of it


def add(model_dir: pathlib.Path, specs: Sequence[ParamSpec], read: Callable[[ParamSpec], np.ndarray]) -> None:
    """Adds what `read` gives to the checkpoint of a model directory, which is none before `finish`. Atomic.

    Does nothing if they are there: a program that was killed may not know.
    """
    context, by_path = ocp.Context(), {spec.path: spec for spec in specs}
    context.array.saving.scoped_storage_options_creator = lambda key, value: _chunks(
        by_path["/".join(part.key for part in key)], value
    )
    try:
        with context:
            ocp.partial.save(_path(model_dir), _nested({spec.path: _immutable(read(spec)) for spec in specs}))
    except Exception as error:
        if type(error).__name__ != "PartialSaveReplacementError":  # which Orbax does not export
            raise


def _immutable(array: np.ndarray) -> np.ndarray | jax.Array:
    """What Orbax need not copy before it writes it, but for numbers that JAX would shorten."""
    return array if array.dtype.itemsize > 4 else jax.block_until_ready(jax.device_put(array))


def finish(model_dir: pathlib.Path) -> None:
    """Makes a checkpoint of what was added."""
    ocp.partial.finalize(_path(model_dir))


def load(
    model_dir: pathlib.Path, definition: ModelDefinition, progress: Callable[[int, int], None] | None = None
) -> tuple[jax.Array, ...]:
    """The arrays of `definition.params`, in their order, dtypes and shardings, whatever mesh wrote them.

    As `hf_reader.load_weights`. What the mesh repeats is restored to all devices first.
    """
    num_kv_heads, total = definition.config.num_kv_heads, definition.weight_bytes
    arrays = {
        spec.path: jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, [], dtype=spec.dtype)
        for spec in definition.params
        if not spec.sharding.addressable_devices  # but those of other processes, which have that stage
    }
    here = [spec for spec in definition.params if spec.path not in arrays]
    done = total - sum(spec.num_bytes for spec in here)
    for group in groups(here, lambda spec: spec.num_bytes, _GROUP_BYTES):
        abstract = {spec.path: _abstract(spec, num_kv_heads) for spec in group}
        restored = _flat(_restore(model_dir, abstract), abstract)
        for spec in group:
            array = restored[spec.path]
            if _is_repeated(spec, num_kv_heads):
                array = jax.jit(spec.repeat, out_shardings=spec.sharding)(array)
            arrays[spec.path] = array
            done += spec.num_bytes
        jax.block_until_ready([arrays[spec.path] for spec in group])
        if progress is not None:
            progress(done, total)
    return tuple(arrays[spec.path] for spec in definition.params)


def read(model_dir: pathlib.Path, path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """One parameter, on the host."""
    abstract = {path: np.empty(shape, dtype)}
    return _flat(_restore(model_dir, abstract), abstract)[path]


def _abstract(spec: ParamSpec, num_kv_heads: int) -> jax.ShapeDtypeStruct:
    is_repeated = _is_repeated(spec, num_kv_heads)
    sharding = NamedSharding(spec.sharding.mesh, PartitionSpec()) if is_repeated else spec.sharding
    return jax.ShapeDtypeStruct(spec.shape_once(num_kv_heads), spec.dtype, sharding=sharding)


def _is_repeated(spec: ParamSpec, num_kv_heads: int) -> bool:
    return spec.shape_once(num_kv_heads) != spec.shape or not spec.is_as_stored


def _chunks(spec: ParamSpec, array: np.ndarray) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """How an array is cut into chunks, each of which is read as a whole: so that a device reads little but its own.

    One head per chunk. Of other matrices Orbax divides the longer side, again and again, until a chunk is small enough;
    those of published models then end where the parts of two to eight devices do, or a seventh of a part later at most.
    """
    options = ocp.options.ArrayOptions.Saving.StorageOptions()
    if array.nbytes > _CHUNK_BYTES:
        options.chunk_byte_size = _CHUNK_BYTES
        options.shard_axes = tuple(i for i, axis in enumerate(spec.axes) if axis in _ONE_PER_CHUNK)
    return options


def _restore(model_dir: pathlib.Path, abstract: dict[str, Any]) -> Any:
    """Of several processes each by itself, as not all have a part of every array."""
    context, process = ocp.Context(), jax.process_index()
    context.pytree.loading.partial_load = True
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = process, {process}
    with context:
        return ocp.load(_path(model_dir), _nested(abstract))


def _path(model_dir: pathlib.Path) -> str:
    return str(model_dir.resolve() / ORBAX_DIRECTORY)


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _flat(tree: Any, paths: Iterable[str]) -> dict[str, Any]:
    leaves = {}
    for path in paths:
        node = tree
        for name in path.split("/"):
            node = node[name]
        leaves[path] = node
    return leaves
