"""`resolve` in all processes of a job, which must come to the same: what differs would be noticed by wrong tokens."""

import hashlib
import pathlib
import socket

import jax

from jaxinfer import devices
from jaxinfer.checkpoint import hf_reader, manifest
from jaxinfer.engine_config import NOT_FLAGS, EngineConfig
from jaxinfer.meshes import describe, ordered
from jaxinfer.process_group import ProcessGroup
from jaxinfer.resolve import ResolvedEncoder, ResolvedEngine, resolve

_LONGEST_TEXT = 400
_NUM_PIECES, _PIECE_BYTES = 16, 4096  # of a file of weights, by which it is known


def resolve_together(config: EngineConfig, group: ProcessGroup) -> tuple[ResolvedEngine, list[str]]:
    """The same in every process, and lines for the user on how the mesh lies over their machines.

    Raises ValueError, in all processes, for what one of them was given or has read otherwise; and for an encoder.
    """
    flags = {f"--{name}": repr(value) for name, value in vars(config).items() if name not in NOT_FLAGS}
    check_same(group, "config", flags)
    machines = group.all_gather("machine", socket.gethostname())

    def least_free_bytes(device: jax.Device) -> int | None:  # so that all make the same plan
        of_all = group.all_gather("free bytes", devices.free_bytes(device))
        return min((free for free in of_all if free is not None), default=None)

    resolved = resolve(config, least_free_bytes, ordered(jax.devices(), machines))
    if isinstance(resolved, ResolvedEncoder):
        raise ValueError(f"{resolved.architecture} is an encoder, which runs in one process; start only one")
    check_same(group, "resolved", _facts(resolved))
    return resolved, describe(resolved.definition.partitioner.device_mesh, machines)


def check_same(group: ProcessGroup, topic: str, texts: dict[str, str]) -> None:
    """Raises ValueError, in all processes, for a text that is another in one of them."""
    first, *others = group.all_gather(topic, texts)
    for index, other in enumerate(others, 1):
        for name in first | other:
            ours, theirs = first.get(name, "missing"), other.get(name, "missing")
            if ours != theirs:
                values = f"is {_short(ours)} in process 0 and {_short(theirs)} in process {index}"
                raise ValueError(f"{name} {values}; give all processes the same")


def _facts(resolved: ResolvedEngine) -> dict[str, str]:
    """What programs and steps are made of, and the weights. Choices come first: they are named, not what follows."""
    facts = {"jax": jax.__version__, "architecture": resolved.architecture}
    facts |= {"attention_backend": resolved.attention.name, "dtype": resolved.definition.dtype.name}
    if resolved.experts is not None:
        facts["moe_backend"] = resolved.experts.name
    decided = ("max_model_len", "slots_per_shard", "cache_spec", "memory", "buckets")
    facts |= {name: repr(getattr(resolved, name)) for name in decided}
    facts |= {f"config.json: {name}": repr(value) for name, value in vars(resolved.definition.config).items()}
    return facts | {f"content of {path.name}": _content(path) for path in _weight_files(resolved)}


def _weight_files(resolved: ResolvedEngine) -> list[pathlib.Path]:
    """Or, where there is one, the file that lists them with their digests."""
    if manifest.is_there(resolved.model_dir):
        return [resolved.model_dir / manifest.MANIFEST]
    tensors = hf_reader.open_index(resolved.model_dir, resolved.definition).tensors.values()
    return sorted({tensor.path for tensor in tensors})


def _content(path: pathlib.Path) -> str:
    """A digest of the size and of evenly spaced pieces: training changes weights everywhere."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_NUM_PIECES):
            file.seek(max(0, size - _PIECE_BYTES) * i // (_NUM_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
