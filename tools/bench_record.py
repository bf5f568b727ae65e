"""What a benchmark says about itself, so that someone can repeat it. The record is the last line that it prints."""

import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import jax

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def describe_run(program: str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """The command, the versions of jax and `packages`, the machine and the commit. `program` is tools/`program`.py."""
    return {
        "command": " ".join(["python", f"tools/{program}.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", *packages)},
        "machine": describe_machine(),
        "commit": commit(_ROOT),
    }


def describe_machine() -> dict[str, Any]:
    """The devices that jax finds, with NVIDIA's driver where there is one, and the host."""
    devices = jax.devices()
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    machine = {"device": devices[0].device_kind, "num_devices": len(devices), "cpu": (names or [platform.machine()])[0]}
    driver = [line.partition(":")[2].strip() for line in _lines("/proc/driver/nvidia/version")[:1]]
    return machine | {"cores": os.cpu_count()} | ({"driver": driver[0]} if driver else {})


def commit(root: pathlib.Path) -> str:
    """Of the checkout at `root`, "-dirty" behind it if files differ from it; "unknown" for what is no checkout.

    Documents may differ: new records do, while more are made.
    """
    if not (root / ".git").exists():  # installed, perhaps within somebody else's repository
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--verify", "--quiet", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!README.md")
    return f"{head}-dirty" if head and changed else head or "unknown"


def print_record(record: dict[str, Any]) -> None:
    """As one line of JSON."""
    print(json.dumps(record), flush=True)


def _lines(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
