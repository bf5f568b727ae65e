"""Memory that this process may still use, which is what the kernel has within its containers' limits, and has used.

Linux only. A container sees the whole machine in /proc/meminfo, and is killed at the limit of its control group.
"""

import contextlib
import ctypes
import pathlib
from collections.abc import Iterator

# Where the two versions of control groups lie, and in which files: limit, usage, and within the statistics those
# pages of files that are given up before anyone is killed.
_V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available_bytes(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """None where the system does not say. `root` is where its files are looked for."""
    return min((*_of_machine(root), *_of_cgroups(root)), default=None)


def peak_bytes(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Of this process so far; 0 where the system does not say. That of getrusage includes the parent's."""
    sizes = (line.split()[1] for line in _lines(root / "proc/self/status") if line.startswith("VmHWM:"))
    return int(next(sizes, 0)) * 1024


def give_back() -> None:
    """Returns to the system what was freed and the allocator keeps: threads that come and go leave it in pieces."""
    with contextlib.suppress(AttributeError):  # an allocator that is not glibc's
        ctypes.CDLL(None).malloc_trim(0)


def _of_machine(root: pathlib.Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _of_cgroups(root: pathlib.Path) -> Iterator[int]:
    """What is left in each control group around this process that has a limit."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, limit_file, usage_file, reclaimable = _V1 if controllers else _V2
        # In a container the path may be the host's, and the group's own files lie at the base.
        for group in (pathlib.PurePosixPath(path), *pathlib.PurePosixPath(path).parents):
            folder = root / base / str(group).lstrip("/")
            limit, usage = (_lines(folder / name) for name in (limit_file, usage_file))
            if not limit or not usage or limit == ["max"]:
                continue
            statistics = dict(stat.split() for stat in _lines(folder / "memory.stat"))
            used = int(usage[0]) - int(statistics.get(reclaimable, 0))
            yield max(0, int(limit[0]) - used)


def _lines(path: pathlib.Path) -> list[str]:
    """Of a file of the kernel's; none if it is not there."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
