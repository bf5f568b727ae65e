"""Loading reads what this process's devices hold and no more, in bytes, from either format."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

from jaxinfer.checkpoint import conversion
from jaxinfer.parameters import ModelDefinition
from tests import load_bytes
from tests.command_line import environment
from tests.parity import recipe


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same 65 MB of weights in both formats, and 27 MB of a mixture."""
    directory = tmp_path_factory.mktemp("models")
    huggingface, orbax = (directory / name for name in load_bytes.FORMATS)
    recipe.write_model(huggingface, load_bytes.CONFIG, recipe.weights("llama", load_bytes.CONFIG))
    conversion.convert(conversion.Source.open(huggingface), orbax, lambda done, total: None)
    experts = load_bytes.EXPERT_CONFIG
    recipe.write_model(directory / load_bytes.EXPERTS, experts, recipe.weights("mixtral", experts))
    return directory


def of_process(directory: pathlib.Path, rank: int, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.load_bytes", str(directory), str(rank), str(port)]
    root, env = pathlib.Path(__file__).parents[1], environment(PJRT_NPROC="32")
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=env, stdout=pipe, stderr=pipe, encoding="utf-8")


@pytest.mark.parametrize("name", load_bytes.FORMATS)
@pytest.mark.parametrize("mesh", load_bytes.MESHES)
def test_a_process_with_all_devices_reads_the_model_once(directory: pathlib.Path, mesh: str, name: str):
    """However many devices hold a slice."""
    definition = load_bytes.define(mesh)
    num_read, _ = load_bytes.count(directory / name, definition)
    assert 0.85 * definition.weight_bytes < num_read < 1.03 * definition.weight_bytes  # Orbax compresses by some 8 %


def test_a_process_reads_the_part_that_its_device_owns(directory: pathlib.Path):
    """A quarter, or what it holds of what others hold too; and of Orbax what lies in the same chunks, and small arrays.

    Of a mixture a quarter of the experts, and all else.
    """
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    processes = [of_process(directory, rank, port) for rank in range(load_bytes.NUM_PROCESSES)]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    model_bytes = load_bytes.define("").weight_bytes
    mixture = load_bytes.define_experts(load_bytes.EXPERT_MESH)
    of_context = 0.25 + 0.25 * _attention_share(load_bytes.define(""))  # which splits no heads
    for rank, (stdout, stderr) in enumerate(outputs):
        assert stdout, stderr
        *dense, (_, _, num_read, num_owned) = json.loads(stdout.splitlines()[-1])
        assert num_owned == mixture.shard_bytes < 0.3 * mixture.weight_bytes
        assert num_owned <= num_read < 1.01 * num_owned, f"process {rank}: of a mixture"
        for mesh, name, num_read, num_owned in dense:
            case = f"process {rank}, {mesh}, {name}: {num_read / model_bytes:.3f} of the model read"
            print(f"{case}, {num_owned / model_bytes:.3f} owned")
            share = {"tensor:4": 0.25, "data:2,tensor:2": 0.5, "stage:2,tensor:2": 0.25}.get(mesh, of_context)
            assert num_owned == pytest.approx(share * model_bytes, rel=0.01)
            assert 0.85 * num_owned < num_read < (1.2 if name == "orbax" else 1.01) * num_owned, case


def _attention_share(definition: ModelDefinition) -> float:
    """Of a model's bytes."""
    return sum(spec.num_bytes for spec in definition.params if "/attention/" in spec.path) / definition.weight_bytes
