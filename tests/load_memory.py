"""Measures that loading keeps peak host memory at the weights plus twice the largest tensor. Not run by pytest.

    python tests/load_memory.py

Writes a random float32 checkpoint of about 1 GB in shards, loads it in a fresh process onto eight virtual CPU
devices with tensor:8, and prints one JSON line; exits with 1 if the limit is passed. On CPU devices the weights
themselves live in host memory. Resident file pages count: VmHWM is the kernel's own high-water mark.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import save_file

# Beside the tensors: the allocator's and XLA's own memory, which does not grow with the model.
CONSTANT_BYTES = 32 << 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 15,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,  # fewer than devices: each is repeated on two
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
NUM_SHARDS = 4


def write_checkpoint(directory: pathlib.Path) -> None:
    """The tensors are made shard by shard, dealt out in turn."""
    from jaxinfer.checkpoint.layout import stored_params

    stored = stored_params(define(""))
    rng = np.random.default_rng(0)
    weight_map = {}
    for shard in range(NUM_SHARDS):
        file_name = f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        tensors = {}
        for param in stored[shard::NUM_SHARDS]:
            tensors[param.tensors[0]] = rng.standard_normal(param.shape, np.float32)
        save_file(tensors, directory / file_name)
        weight_map |= dict.fromkeys(tensors, file_name)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def define(mesh: str):
    import jax.numpy as jnp

    from jaxinfer.hf_config import HFConfig
    from jaxinfer.models import llama
    from jaxinfer.parameters import ModelDefinition
    from jaxinfer.partitioning import Partitioner

    return ModelDefinition.create(llama.parse_config(HFConfig(CONFIG)), Partitioner.create(mesh), jnp.dtype("float32"))


def status_bytes(key: str) -> int:
    """A line of /proc/self/status: VmHWM is the peak of resident memory, VmRSS its present size."""
    match = re.search(rf"^{key}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def measure(directory: pathlib.Path) -> dict[str, object]:
    """Loads the checkpoint and reports by how much resident memory rose at its highest."""
    import jax

    from jaxinfer.checkpoint.hf_reader import load_weights

    definition = define("tensor:8")
    jax.block_until_ready([jax.device_put(np.zeros(1, np.float32), device) for device in jax.devices()])
    with contextlib.suppress(OSError):  # where it is forbidden, the peak of start-up counts too
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from VmRSS
    before = status_bytes("VmRSS")
    arrays = load_weights(directory, definition)
    jax.block_until_ready(arrays)
    peak, after = status_bytes("VmHWM") - before, status_bytes("VmRSS") - before
    # As the devices hold them, so repeated heads count as often as they are there.
    weights = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    largest = max(spec.num_bytes for spec in definition.params)
    limit = weights + 2 * largest + CONSTANT_BYTES
    return {
        "weights_bytes": weights,
        "largest_tensor_bytes": largest,
        "peak_bytes": peak,
        "after_bytes": after,
        "limit_bytes": limit,
        "beyond_weights_in_largest_tensors": round((peak - weights) / largest, 2),
        "ok": peak <= limit,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=pathlib.Path, help=argparse.SUPPRESS)  # in the fresh process
    directory = parser.parse_args().measure
    if directory is not None:
        result = measure(directory)
        print(json.dumps(result))
        return 0 if result["ok"] else 1
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PJRT_NPROC": "32",
        "PYTHONPATH": str(root),
    }
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(pathlib.Path(name))
        command = [sys.executable, __file__, "--measure", name]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    sys.exit(main())
