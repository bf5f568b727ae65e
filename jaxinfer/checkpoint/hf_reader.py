"""Loads a Hugging Face directory straight into its shardings, and proves that every weight was used exactly once.

Each device's slice is read once, even when several devices hold it, cast on the host, and sent. The whole
model never sits in host memory: beside the arrays there are at most the files' pages of the tensor being read, 64 MiB
of those before it, and one copy of the slice in flight.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.checkpoint.hf_index import DTYPES, StoredTensor, TensorIndex, listed
from jaxinfer.checkpoint.layout import Slices, StoredParam, stored_params, tensor_shape, tensors
from jaxinfer.parameters import ModelDefinition

_COMPARED_BYTES = 1 << 24  # of each tensor at a time

# Old Llama checkpoints store this constant, which follows from config.json.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


def load_weights(
    model_dir: pathlib.Path, definition: ModelDefinition, progress: Callable[[int, int], None] | None = None
) -> tuple[jax.Array, ...]:
    """The arrays of `definition.params`, in their order, dtypes and shardings.

    `progress(bytes_done, bytes_total)` is called after each tensor; bytes are those of `definition.weight_bytes`.
    Raises ValueError, before anything is sent to a device, for a directory that is broken or of another model.
    """
    index = open_index(model_dir, definition)
    stored = stored_params(definition)
    check_matches(index, definition)
    done, total = 0, definition.weight_bytes
    arrays = []
    for param in stored:
        arrays.append(_load(index, param, definition.config.num_kv_heads))
        done += param.spec.num_bytes
        if progress is not None:
            progress(done, total)
    return tuple(arrays)


def open_index(model_dir: pathlib.Path, definition: ModelDefinition) -> TensorIndex:
    """The directory's tensors by the names that the model's family gives them."""
    return TensorIndex.open(model_dir).with_prefix(getattr(definition.family, "PREFIX", ""))


def read(index: TensorIndex, param: StoredParam, slices: Slices, dtype: jnp.dtype) -> np.ndarray:
    """These slices of a parameter with its heads merged. No more of its tensors is read than they name."""

    with index.reader() as read_slices:
        return param.assemble(slices, dtype, lambda name, of_tensor: cast(read_slices(name, of_tensor), dtype, name))


def _load(index: TensorIndex, param: StoredParam, num_kv_heads: int) -> jax.Array:
    """One parameter. Returns when the devices have it, so that host copies do not pile up."""
    spec = param.spec
    shard_shape = spec.sharding.shard_shape(spec.shape)
    shards: dict[jax.Device, jax.Array] = {}
    for key, devices in _devices_by_slices(param, num_kv_heads).items():
        # Heads apart again. A KV head that is repeated is alone on each of its devices, so none is repeated here.
        data = _read_slots(index, param, tuple(slice(*ends) for ends in key), spec.dtype).reshape(shard_shape)
        shards |= {device: jax.device_put(data, device) for device in devices}
        jax.block_until_ready(list(shards.values()))
    in_order = [shards[device] for device in spec.sharding.addressable_devices_indices_map(spec.shape)]
    return jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, in_order, dtype=spec.dtype)


def _read_slots(index: TensorIndex, param: StoredParam, slices: Slices, dtype: jnp.dtype) -> np.ndarray:
    """As `read`, but of the parameter's own slots, if it has experts."""
    first, *others = param.runs(slices)
    if not others:
        return read(index, param, first, dtype)
    whole, end = np.empty([s.stop - s.start for s in slices], dtype), 0
    for run in (first, *others):
        start, end = end, end + run[0].stop - run[0].start
        whole[start:end] = read(index, param, run, dtype)
    return whole


def _devices_by_slices(param: StoredParam, num_kv_heads: int) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """The distinct slices of the stored parameter, as (start, stop) pairs, and the devices that need each."""
    groups: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in param.spec.sharding.addressable_devices_indices_map(param.spec.shape).items():
        assert index is not None
        slices = param.slices(index, num_kv_heads)
        groups.setdefault(tuple((s.start, s.stop) for s in slices), []).append(device)
    return groups


def stored_dtypes(index: TensorIndex, definition: ModelDefinition) -> dict[str, np.dtype]:
    """Of each parameter, whose tensors must have passed `check_matches`."""
    params = stored_params(definition)
    return {param.spec.path: jnp.dtype(DTYPES[index.tensors[param.tensors[0]].dtype]) for param in params}


def cast(data: np.ndarray, dtype: jnp.dtype, name: str) -> np.ndarray:
    """Raises ValueError where a number of the tensor `name` has no place in `dtype`."""
    if data.dtype == dtype:
        return data
    with np.errstate(over="ignore"):
        cast = data.astype(dtype)
    # bfloat16 reaches as far as float32; float16 ends at 65504, and NumPy does not warn for every pair of dtypes.
    if dtype == jnp.float16 and np.isinf(cast).any() and not np.isinf(data).any():
        raise ValueError(f"{name}: holds values beyond float16's 65504; use --dtype=bfloat16 or --dtype=float32")
    return cast


def check_matches(index: TensorIndex, definition: ModelDefinition) -> None:
    """Raises ValueError unless the directory has exactly the model's tensors, with the shapes of config.json."""
    stored = stored_params(definition)
    expected = {name: tensor_shape(parts) for name, parts in tensors(stored).items()}
    left_over = index.tensors.keys() - expected.keys() - unused_tensors(index, definition)
    tied_copies = {copy: table for copy, table in _tied_copies(definition).items() if copy in left_over}
    left_over -= tied_copies.keys()
    missing = expected.keys() - index.tensors.keys()
    if missing or left_over:
        raise ValueError(
            f"{index.model_dir}: the weights are not those of config.json's {definition.config.family} model: "
            f"missing {listed(map(index.in_file, missing))}; left over {listed(map(index.in_file, left_over))}"
        )
    expected |= {copy: expected[table] for copy, table in tied_copies.items()}
    mismatches = (_mismatch(name, index.tensors[name], shape) for name, shape in expected.items())
    if wrong := [text for text in mismatches if text]:
        raise ValueError(f"{index.model_dir}: tensors that do not fit config.json: {listed(wrong)}")
    for param in stored:
        if len(dtypes := {index.tensors[name].dtype for name in param.tensors}) > 1:
            raise ValueError(f"{index.model_dir}: {param.tensors[0]} and the other experts' are {listed(dtypes)}")
    for copy, table in tied_copies.items():
        _check_equal(index, copy, table)


def unused_tensors(index: TensorIndex, definition: ModelDefinition) -> set[str]:
    """Names of the directory's tensors that inference does not need."""
    unused = {name for name in index.tensors if name.endswith(_IGNORED_SUFFIX)}
    find_unused = getattr(definition.family, "unused_tensors", None)
    return unused | find_unused(definition.config, index.tensors.keys()) if find_unused else unused


def _mismatch(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> str:
    if tensor.dtype not in DTYPES:
        return f"{name} in {tensor.path.name} is {tensor.dtype}, readable are {' '.join(DTYPES)}"
    if tensor.shape != shape:
        return f"{name} in {tensor.path.name} has shape {tensor.shape}, expected {shape}"
    return ""


def _tied_copies(definition: ModelDefinition) -> dict[str, str]:
    """The head's tensor, which some exporters write although it is tied, and the embedding's that it must equal."""
    if not definition.config.tie_embeddings:
        return {}
    names = definition.family.weight_names(definition.config)
    untied = definition.family.weight_names(dataclasses.replace(definition.config, tie_embeddings=False))
    return {part.name: names["embedding/table"].name for path, part in untied.items() if path not in names}


def _check_equal(index: TensorIndex, head: str, table: str) -> None:
    """A head that was trained apart and then ignored would make wrong text, so a tied copy must be one."""
    num_rows, row_size = index.tensors[table].shape
    step = max(1, _COMPARED_BYTES // (row_size * 4))
    with index.reader() as read_slices:
        for start in range(0, num_rows, step):
            rows = (slice(start, min(start + step, num_rows)), slice(0, row_size))
            if not np.array_equal(read_slices(head, rows), read_slices(table, rows), equal_nan=True):
                raise ValueError(
                    f"{index.model_dir}: config.json ties {head} to {table}, but the two differ in rows "
                    f"{start}:{rows[0].stop}; if both are meant, set tie_word_embeddings to false"
                )
