"""Counts the bytes that one of several processes reads to load its part of a model. Run by test_incremental_load.py.

    python -m tests.load_bytes DIRECTORY RANK PORT

Each process has one device. Prints a JSON list, of each mesh and format: [mesh, format, bytes read, bytes owned].
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint import (
    orbax_weights,  # noqa: F401  # Orbax reads files when it is imported, which are none of a model's
    reader,
)
from jaxinfer.checkpoint.hf_index import ReadTensor, TensorIndex
from jaxinfer.checkpoint.layout import Slices
from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama, mixtral
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner

NUM_PROCESSES = 4
MESHES = ("tensor:4", "data:2,tensor:2", "stage:2,tensor:2", "context:2,tensor:2")
EXPERT_MESH, EXPERTS = "expert:4", "experts"  # and the name of a directory, in the first of the formats
FORMATS = (reader.HUGGING_FACE, reader.ORBAX)  # and the names of their directories
CONFIG = llama.TINY_CONFIGS["gqa"] | {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


EXPERT_CONFIG = mixtral.TINY_CONFIGS["gqa"] | {"hidden_size": 256, "intermediate_size": 512}


def define(mesh: str) -> ModelDefinition:
    return _define(llama.parse_config(HFConfig(CONFIG)), mesh)


def define_experts(mesh: str) -> ModelDefinition:
    return _define(mixtral.parse_config(HFConfig(EXPERT_CONFIG)), mesh)


def _define(config: ModelConfig, mesh: str) -> ModelDefinition:
    return ModelDefinition.create(config, Partitioner.create(mesh), jnp.dtype("float32"))


def count(model_dir: pathlib.Path, definition: ModelDefinition) -> tuple[int, int]:
    """Loads it. Bytes that this process read, and that its devices then own."""
    with _slices_read() as sizes:
        before = _bytes_of_read_calls()
        arrays = reader.load_weights(model_dir, definition)
        num_read = _bytes_of_read_calls() - before + sum(sizes)
    return num_read, sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)


def _bytes_of_read_calls() -> int:
    """Of this process so far; Orbax reads so. What is read of a file that is mapped into memory is not in it."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@contextlib.contextmanager
def _slices_read() -> Iterator[list[int]]:
    """The sizes of what is read of safetensors files, which are mapped."""
    sizes: list[int] = []
    original = TensorIndex.reader

    @contextlib.contextmanager
    def counting(index: TensorIndex) -> Iterator[ReadTensor]:
        with original(index) as read:

            def counted(name: str, slices: Slices) -> np.ndarray:
                data = read(name, slices)
                sizes.append(data.nbytes)
                return data

            yield counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorIndex, "reader", counting)
        yield sizes


def main(directory: str, rank: str, port: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", NUM_PROCESSES, int(rank))
    found = []
    for mesh in MESHES:
        definition = define(mesh)
        found += [[mesh, name, *count(pathlib.Path(directory, name), definition)] for name in FORMATS]
    found.append([EXPERT_MESH, EXPERTS, *count(pathlib.Path(directory, EXPERTS), define_experts(EXPERT_MESH))])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
