"""Which axes of a mesh cross processes, and that every process has a part."""

import dataclasses
import re
from typing import Any

import pytest

from jaxinfer.meshes import describe, make_mesh


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def devices(num_processes: int, each: int) -> list[Any]:
    return [FakeDevice(2048 * process + i, process) for process in range(num_processes) for i in range(each)]


@pytest.mark.parametrize(
    ("mesh", "num_processes", "each", "lines"),
    [
        (
            "tensor:4,data:2",
            2,
            4,
            ["mesh data:2,tensor:4 over 2 processes of 4 devices: data crosses processes, tensor stays inside one"],
        ),
        (
            "data:4,tensor:2",
            2,
            4,
            ["mesh data:4,tensor:2 over 2 processes of 4 devices: data crosses processes, tensor stays inside one"],
        ),
        ("data:2", 2, 1, ["mesh data:2 over 2 processes of 1 device: data crosses processes"]),
        (
            "data:2,tensor:4",
            4,
            2,
            [
                "mesh data:2,tensor:4 over 4 processes of 2 devices: data crosses processes, tensor crosses processes",
                "warning: tensor crosses processes, so every layer waits for the link between them; tensor:2 would "
                "stay inside one",
            ],
        ),
        (
            "tensor:2",
            2,
            1,
            [
                "mesh tensor:2 over 2 processes of 1 device: tensor crosses processes",
                "warning: tensor crosses processes, so every layer waits for the link between them; a process can have "
                "all devices of a machine",
            ],
        ),
    ],
)
def test_lines(mesh: str, num_processes: int, each: int, lines: list[str]):
    assert describe(make_mesh(mesh, devices(num_processes, each))) == lines


def test_devices_of_a_process_are_neighbours(monkeypatch: pytest.MonkeyPatch):
    """Whatever order jax has them in."""
    mixed = devices(2, 2)[::2] + devices(2, 2)[1::2]
    monkeypatch.setattr("jax.devices", lambda: mixed)
    grid = make_mesh("data:2,tensor:2").devices
    assert [[device.process_index for device in row] for row in grid] == [[0, 0], [1, 1]]


@pytest.mark.parametrize("mesh", ["", "tensor:2", "data:2"])
def test_every_process_must_have_a_part(mesh: str):
    needed = 2 if mesh else 1
    problem = f"--mesh={mesh} uses {needed} of the 4 devices of 2 processes, and each must have a part"
    with pytest.raises(ValueError, match=re.escape(problem)):
        make_mesh(mesh, devices(2, 2))
