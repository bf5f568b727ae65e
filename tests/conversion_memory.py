"""Converts a random checkpoint to Orbax and back, and compares the bytes. Not run by pytest.

    python tests/conversion_memory.py [--layers=32]

Writes a bfloat16 Llama of about 8 GB, runs `convert_checkpoint` on it and on what came out, and passes on what that
prints: GB/s, peak of host memory, size of the largest tensor. Exits with 1 unless the third directory's weights are
the first's. Takes three times the model's size on disk.
"""

import argparse
import filecmp
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 131072,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def write_checkpoint(directory: pathlib.Path, num_layers: int) -> None:
    """Tensor by tensor, of random bits: they do not compress."""
    from jaxinfer.checkpoint.hf_writer import write_tensors
    from jaxinfer.checkpoint.layout import StoredParam
    from jaxinfer.hf_config import HFConfig
    from jaxinfer.models import llama
    from jaxinfer.parameters import ModelDefinition
    from jaxinfer.partitioning import Partitioner

    config, rng = CONFIG | {"num_hidden_layers": num_layers}, np.random.default_rng(0)
    dtype = jnp.dtype("bfloat16")
    definition = ModelDefinition.create(llama.parse_config(HFConfig(config)), Partitioner.abstract(""), dtype)

    def read(param: StoredParam) -> np.ndarray:
        return np.frombuffer(rng.bytes(2 * int(np.prod(param.shape))), dtype).reshape(param.shape)

    write_tensors(directory, definition, {spec.path: dtype for spec in definition.params}, read)
    (directory / "config.json").write_text(json.dumps(config))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="of 0.2 GB each")
    num_layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as name:
        source, orbax, back = (pathlib.Path(name, part) for part in ("source", "orbax", "back"))
        source.mkdir()
        write_checkpoint(source, num_layers)
        command = [sys.executable, "-m", "jaxinfer.convert_checkpoint", "--nocheck"]
        for before, after in ((source, orbax), (orbax, back)):
            paths = [f"--source={before}", f"--target={after}"]
            subprocess.run([*command, *paths], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        files = sorted(path.name for path in source.glob("*.safetensors*"))
        _, *wrong = filecmp.cmpfiles(source, back, files, shallow=False)
        print(f"{len(files)} files, different: {wrong[0]}, missing: {wrong[1]}")
        return int(any(wrong))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
