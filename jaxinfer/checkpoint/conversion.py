"""Converts a model directory: Hugging Face's safetensors to Orbax, or back. Large parameters go one at a time.

The new directory is filled under another name, `.name.partial`, and gets its own when it is whole, with a manifest
inside. A conversion that was cut short, even by a kill, leaves that one behind, and goes on from it.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from jaxinfer import host_memory, models
from jaxinfer.checkpoint import hf_reader, hf_writer, manifest, orbax_weights
from jaxinfer.checkpoint.groups import groups
from jaxinfer.checkpoint.hf_index import INDEX_FILE, TensorIndex
from jaxinfer.checkpoint.layout import StoredParam, stored_params
from jaxinfer.checkpoint.reader import HUGGING_FACE, ORBAX, about_params, check_matches, format_of
from jaxinfer.hf_config import QUANTIZATION_KEY, HFConfig
from jaxinfer.param_specs import ParamSpec
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner

_STATE = "conversion.json"  # in an unfinished directory: what it is made from
_WRITTEN = "written.txt"  # the parameters that are in its checkpoint
_FINISHING, _KEPT = "finishing", "written.kept"
_SIDE_SUFFIXES = (".jinja", ".json", ".md", ".model", ".txt")  # of files that come along
_SIDE_NAMES = ("LICENSE", "NOTICE")

_GROUP_BYTES = 1 << 26  # written by one call, which costs a few files and hundredths of a second

Advance = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model directory that can be read.

    Attributes:
      format: HUGGING_FACE or ORBAX.
      definition: over a mesh whose devices need not be there.
      stored_dtypes: of each parameter, by its path.
      dtypes: the same, as they shall be written.
    """

    model_dir: pathlib.Path
    format: str
    definition: ModelDefinition
    stored_dtypes: dict[str, np.dtype]
    dtypes: dict[str, np.dtype]

    @classmethod
    def open(cls, model_dir: pathlib.Path, dtype: str = "auto", mesh: str = "") -> "Source":
        """Checks that the weights are those of config.json. Raises ValueError. `dtype` "auto" keeps the stored ones."""
        hf, stored_format = HFConfig.read(model_dir), format_of(model_dir)
        config = models.for_architecture(hf.architecture).parse_config(hf)
        definition = ModelDefinition.create(config, Partitioner.abstract(mesh), jnp.dtype("float32"))
        if stored_format == ORBAX:
            check_matches(model_dir, definition)
            params = manifest.read(model_dir)["about"]["params"]
            stored = {path: jnp.dtype(dtype) for path, (_, dtype) in params.items()}
        else:
            index = hf_reader.open_index(model_dir, definition)
            hf_reader.check_matches(index, definition)
            stored = hf_reader.stored_dtypes(index, definition)
        wanted = stored
        if dtype != "auto":  # but for what a model of that dtype never rounds
            params = ModelDefinition.create(config, Partitioner.abstract(""), jnp.dtype(dtype)).params
            wanted = {spec.path: jnp.dtype(spec.dtype) for spec in params}
        return cls(model_dir, stored_format, definition, stored, wanted)

    @property
    def target_format(self) -> str:
        """The other one."""
        return HUGGING_FACE if self.format == ORBAX else ORBAX

    @functools.cached_property
    def params(self) -> tuple[StoredParam, ...]:
        """In the order of `definition.params`."""
        return stored_params(self.definition)

    @property
    def num_bytes(self) -> int:
        """Of all that shall be written."""
        return sum(map(self.param_bytes, self.params))

    @property
    def unused_tensors(self) -> list[str]:
        """Names of a Hugging Face directory's tensors that have no parameter, and so no place in the new one."""
        return sorted(hf_reader.unused_tensors(self._index, self.definition)) if self.format == HUGGING_FACE else []

    @functools.cached_property
    def _index(self) -> TensorIndex:
        return hf_reader.open_index(self.model_dir, self.definition)

    def param_bytes(self, param: StoredParam) -> int:
        return math.prod(param.shape) * self.dtypes[param.spec.path].itemsize

    def read(self, param: StoredParam) -> np.ndarray:
        """A parameter with its heads merged, in the dtype in which it shall be written."""
        spec = param.spec
        if self.format == HUGGING_FACE:
            whole = tuple(slice(0, size) for size in param.shape)
            return hf_reader.read(self._index, param, whole, self.dtypes[spec.path])
        shape = spec.shape_once(self.definition.config.num_kv_heads)
        data = orbax_weights.read(self.model_dir, spec.path, shape, self.stored_dtypes[spec.path])
        return hf_reader.cast(data, self.dtypes[spec.path], spec.path).reshape(param.shape)


def convert(source: Source, target: pathlib.Path, progress: Advance) -> None:
    """Writes `source` in the other format to `target`, which must not exist.

    A source that has a manifest is verified first: what it lost would get a new manifest, which says nothing. Raises
    ValueError for what cannot be done, and what the system raises; then nothing is left.
    """
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists; name a new directory")
    target = target.resolve()
    partial = target.with_name(f".{target.name}.partial")
    if partial.is_symlink():
        raise ValueError(f"{partial} is a link; remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if manifest.is_there(source.model_dir):
            manifest.verify(source.model_dir)
        try:
            _prepare(partial, source)
            _check_disk(partial, source.num_bytes)
            _fill(partial, source, progress)
        except Exception:  # and not at an interruption: then the next call goes on
            _remove(partial)
            raise
        os.rename(partial, target)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Raises ValueError where another process is in such a block. The system lets go of the lock of one that dies."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another conversion writes to the same target; wait for it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _remove(partial: pathlib.Path) -> None:
    """Until it stays away: Orbax's threads write on after an error, and bring it back.

    Should they do so after that, or for longer, the next call finds it, and goes on from it or begins anew.
    """
    num_quiet = 0
    for _ in range(50):
        shutil.rmtree(partial, ignore_errors=True)
        _pause()
        num_quiet = 0 if partial.exists() else num_quiet + 1
        if num_quiet == 3:
            return


def _pause() -> None:
    time.sleep(0.1)


def _fill(partial: pathlib.Path, source: Source, progress: Advance) -> None:
    _copy_side_files(source.model_dir, partial)
    if source.target_format == ORBAX:
        _write_orbax(source, partial, progress)
    else:
        hf_writer.write_tensors(partial, source.definition, source.dtypes, source.read, progress)
    params = about_params(source.definition, source.dtypes)
    notes = (_STATE, _WRITTEN, _FINISHING)
    manifest.write(partial, {"format": source.target_format, "params": params}, without=notes)
    for name in notes:
        (partial / name).unlink(missing_ok=True)


def _check_disk(partial: pathlib.Path, num_bytes: int) -> None:
    """With what is there already, of a conversion that goes on."""
    held = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial).free
    if held + free < num_bytes:
        needed, left = (num_bytes - held) / 1e9, free / 1e9
        raise ValueError(f"{partial.parent}: needs {needed:.2f} GB more, and has {left:.2f} GB free")


def _prepare(partial: pathlib.Path, source: Source) -> None:
    """A directory to fill: the one that an equal conversion left behind, else a new one."""
    files = sorted(path for path in source.model_dir.iterdir() if path.is_file())
    state = {
        "to": source.target_format,
        "group_bytes": _GROUP_BYTES,
        "dtypes": {path: dtype.name for path, dtype in source.dtypes.items()},
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
    }
    try:
        can_go_on = json.loads((partial / _STATE).read_text()) == state and not _is_in_doubt(partial)
    except (OSError, ValueError):
        can_go_on = False
    if not can_go_on:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _STATE).write_text(json.dumps(state))


def _is_in_doubt(partial: pathlib.Path) -> bool:
    """Whether it was cut while its checkpoint was put together, which cannot be gone on with."""
    return (partial / _FINISHING).exists() and not (partial / _WRITTEN).exists()


def _copy_side_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Configuration, tokenizer and what people read: never weights of another format, and never code."""
    for path in sorted(source.iterdir()):
        is_ours = path.name in (manifest.MANIFEST, manifest.COMPLETE, INDEX_FILE)
        if not is_ours and (path.suffix in _SIDE_SUFFIXES or path.name in _SIDE_NAMES):
            shutil.copyfile(path, target / path.name)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    if config.pop(QUANTIZATION_KEY, None) is not None:  # what is written is not packed
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_orbax(source: Source, partial: pathlib.Path, progress: Advance) -> None:
    log, num_kv_heads = partial / _WRITTEN, source.definition.config.num_kv_heads
    written, done = set(log.read_text().splitlines() if log.exists() else ()), 0
    for group in groups(source.params, source.param_bytes, _GROUP_BYTES):
        if not {param.spec.path for param in group} <= written:
            by_path = {param.spec.path: param for param in group}

            def read(spec: ParamSpec, by_path: dict[str, StoredParam] = by_path) -> np.ndarray:
                return source.read(by_path[spec.path]).reshape(spec.shape_once(num_kv_heads))

            orbax_weights.add(partial, [param.spec for param in group], read)
            host_memory.give_back()
            with open(log, "a") as file:
                file.writelines(f"{param.spec.path}\n" for param in group)
        done += sum(map(source.param_bytes, group))
        progress(done, source.num_bytes)
    if not (partial / _FINISHING).exists():
        (partial / _FINISHING).touch()
        log.rename(partial / _KEPT)  # in doubt until it is back
        orbax_weights.finish(partial)
        (partial / _KEPT).rename(log)
