"""Several processes are one engine: the tokens of one process, from steps that are the same in each."""

import json
import pathlib
import sys

import pytest

from jaxinfer import Engine
from tests import local_processes, tiny_model
from tests.distributed_worker import load
from tests.long_campaign import chosen

PAIRS = ("data:2,tensor:2", "stage:2,tensor:2", "data:2,stage:2")
JOBS = chosen(
    (
        (2, 1, ("tensor:2",)),
        (2, 1, ("data:2", "stage:2")),
        (2, 2, PAIRS[2:]),
        (2, 2, PAIRS[:2]),
        (2, 2, ("tensor:4",)),
        *((4, 1, (mesh,)) for mesh in (*PAIRS, "tensor:4", "data:4")),
    ),
    (2, 1, ("tensor:2",)),
    (2, 2, PAIRS[2:]),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def alone(model_dir: pathlib.Path) -> list[list[list[int]]]:
    """The tokens of one process with one device."""
    with Engine(str(model_dir), **tiny_model.SIZES) as engine:
        return load(engine)


@pytest.mark.parametrize(("count", "devices_each", "meshes"), JOBS)
def test_the_same_tokens_from_the_same_steps(
    count: int,
    devices_each: int,
    meshes: tuple[str, ...],
    model_dir: pathlib.Path,
    alone: list[list[list[int]]],
):
    """After a step that failed, too, on every mesh, in one job: so in some engines follow each other."""
    worker = [sys.executable, "-m", "tests.distributed_worker", str(model_dir), ";".join(meshes)]
    address = f"127.0.0.1:{local_processes.free_port()}"
    commands = [[*worker, address, str(count), str(index)] for index in range(count)]
    with local_processes.started(commands, devices_each=devices_each) as processes:
        local_processes.wait(processes, local_processes.START_S)
        assert [one.process.returncode for one in processes] == [0] * count, processes[0].stderr
        results = [[json.loads(line) for line in one.stdout.splitlines()] for one in processes]
    for mesh, *of_processes in zip(meshes, *results, strict=True):
        assert of_processes[0]["tokens"] == alone, mesh
        assert of_processes[0]["num_steps"] > 0
        assert len({(result["digest"], result["num_steps"]) for result in of_processes}) == 1, mesh
