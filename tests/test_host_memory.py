"""Free memory on a machine and in containers, from the kernel's files as they look there."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxinfer.host_memory import available_bytes, peak_bytes

MEMINFO = {"proc/meminfo": "MemTotal:       32000000 kB\nMemFree:   1 kB\nMemAvailable:       20000000 kB\n"}
MACHINE = 20000000 * 1024
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
UNLIMITED_V1 = 9223372036854771712


def available(root: pathlib.Path, files: dict[str, str]) -> int | None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return available_bytes(root)


def v1(group: str, limit: int, usage: int, inactive_file: int = 0) -> dict[str, str]:
    folder = f"{V1}{group}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.stat": f"cache 5\ninactive_file 7\ntotal_inactive_file {inactive_file}\n",
    }


def v2(group: str, limit: int | str, usage: int, inactive_file: int = 0) -> dict[str, str]:
    folder = f"{V2}{group}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive_file}\n",
    }


IN_V2 = MEMINFO | {"proc/self/cgroup": "0::/\n"}
IN_V1 = MEMINFO | {"proc/self/cgroup": "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/docker/ab\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, MACHINE),
        (IN_V2, MACHINE),
        (IN_V2 | v2("", "max", 10), MACHINE),
        (IN_V2 | v2("", 5000, 4000), 1000),
        (IN_V2 | v2("", 5000, 4000, inactive_file=300), 1300),
        (IN_V2 | v2("", 5000, 6000), 0),
        (IN_V1 | v1("/docker/ab", 5000, 4000, inactive_file=300), 1300),
        (IN_V1 | v1("/docker/ab", UNLIMITED_V1, 4000), MACHINE),
        # The path is the host's, and the container's own group is what is mounted.
        (IN_V1 | v1("", 5000, 4000), 1000),
        # A group within a group: the tighter one holds.
        ({"proc/self/cgroup": "0::/pod/one\n"} | v2("/pod/one", "max", 50) | v2("/pod", 900, 100), 800),
        ({"proc/self/cgroup": "0::/pod/one\n"} | v2("/pod/one", 300, 50) | v2("/pod", 900, 100), 250),
        # Another controller's group is not asked.
        (MEMINFO | {"proc/self/cgroup": "3:cpuset:/a\n"} | v1("/a", 5000, 4000), MACHINE),
    ],
)
def test_the_tightest_limit_counts(tmp_path: pathlib.Path, files: dict[str, str], expected: int | None):
    assert available(tmp_path, files) == expected


def test_this_machine_has_memory():
    free = available_bytes()
    assert free is None or 2**20 < free < 2**50


def test_the_peak_is_this_process_own(tmp_path: pathlib.Path):
    """Not that of whoever started it."""
    held = np.ones(300 << 20, np.uint8)
    code = "from jaxinfer.host_memory import peak_bytes; print(peak_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert 0 < int(child.stdout) < held.nbytes < peak_bytes()
    assert peak_bytes(tmp_path) == 0
