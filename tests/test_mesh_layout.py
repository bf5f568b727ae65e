"""How a mesh lies over the machines of a job, and that every process has its part."""

import dataclasses
import re
from typing import Any

import pytest

from jaxinfer.meshes import describe, make_mesh, ordered

LINK = "warning: tensor crosses machines, so every layer waits for the link between them"


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def devices(*each: int) -> list[Any]:
    return [FakeDevice(2048 * process + i, process) for process, count in enumerate(each) for i in range(count)]


@pytest.mark.parametrize(
    ("mesh", "machines", "each", "lines"),
    [
        (
            "tensor:4,data:2",
            "ab",
            4,
            [
                "mesh data:2,tensor:4 over 2 processes of 4 devices on 2 machines: data crosses machines, tensor stays "
                "inside one"
            ],
        ),
        (
            "data:2,tensor:4",  # a process for each GPU
            "aaaabbbb",
            1,
            [
                "mesh data:2,tensor:4 over 8 processes of 1 device on 2 machines: data crosses machines, tensor stays "
                "inside one"
            ],
        ),
        (
            "data:2,tensor:4",  # srun --distribution=cyclic
            "abababab",
            1,
            [
                "mesh data:2,tensor:4 over 8 processes of 1 device on 2 machines: data crosses machines, tensor stays "
                "inside one"
            ],
        ),
        ("tensor:2", "aa", 1, ["mesh tensor:2 over 2 processes of 1 device on 1 machine"]),
        (
            "data:2,tensor:4",
            "aabc",
            2,
            [
                "mesh data:2,tensor:4 over 4 processes of 2 devices on 3 machines: data crosses machines, tensor "
                "crosses machines",
                f"{LINK}; tensor:2 would stay inside one",
            ],
        ),
        (
            "tensor:2",
            "ab",
            1,
            ["mesh tensor:2 over 2 processes of 1 device on 2 machines: tensor crosses machines", LINK],
        ),
    ],
)
def test_lines(mesh: str, machines: str, each: int, lines: list[str]):
    found = ordered(devices(*[each] * len(machines)), machines)
    assert describe(make_mesh(mesh, found), machines) == lines


@pytest.mark.parametrize(
    ("machines", "processes"), [(None, [0, 0, 1, 1, 2, 2]), ("aba", [0, 0, 2, 2, 1, 1]), ("bba", [0, 0, 1, 1, 2, 2])]
)
def test_devices_of_a_machine_are_neighbours(machines: str | None, processes: list[int]):
    """Whatever order jax has them in, those of process 0's first."""
    mixed = devices(2, 2, 2)[::2] + devices(2, 2, 2)[1::2]
    found = ordered(mixed, machines)
    assert [device.process_index for device in found] == processes
    assert [device.id % 2048 for device in found] == [0, 1] * 3


def test_they_are_without_being_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jax.devices", lambda: devices(2, 2)[::-1])
    assert make_mesh("data:2,tensor:2").devices.ravel().tolist() == devices(2, 2)


@pytest.mark.parametrize("mesh", ["", "tensor:2", "data:2"])
def test_every_process_must_have_a_part(mesh: str):
    needed = 2 if mesh else 1
    problem = f"--mesh={mesh} uses {needed} of the 4 devices of 2 processes, and each must have a part"
    with pytest.raises(ValueError, match=re.escape(problem)):
        make_mesh(mesh, devices(2, 2))


def test_a_part_as_large_as_any_other():
    with pytest.raises(ValueError, match="the same number of devices, and there are 4 in process 0, 2 in process 1"):
        make_mesh("data:6", devices(4, 2))


@pytest.mark.parametrize(
    ("mesh", "each", "hint"),
    [
        ("data:2,tensor:2", (1, 1), " or --num_cpu_devices=2"),
        ("tensor:4", (1,), " or --num_cpu_devices=4"),
        ("data:5", (2, 2), ""),
    ],
)
def test_how_many_devices_a_process_would_need(mesh: str, each: tuple[int, ...], hint: str):
    with pytest.raises(ValueError, match=re.escape(f"use a smaller mesh{hint}") + "$"):
        make_mesh(mesh, devices(*each))
