"""Settings of kernels that were measured to be fast, `<device>.json` for each kind of device: `tools/tune_kernel.py`.

A file has a list of entries, each

    {"kernel": "paged_attention/triton/decode", "for": {"head_dim": 128, ...}, "settings": {...}, "record": {...}}

and an entry is for calls of which all in its "for" is true. What has none gets the kernel's own defaults.
"""

import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

FOLDER = pathlib.Path(__file__).parent


def file_name(device_kind: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3.json" """
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def settings(kernel: str, device_kind: str | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """Measured on `device_kind` for such a call; empty if there are none, or the device is not known."""
    if device_kind is None:
        return {}
    for entry in read(FOLDER / file_name(device_kind)):
        if entry["kernel"] == kernel and entry["for"] == {name: call[name] for name in entry["for"]}:
            return dict(entry["settings"])
    return {}


@functools.cache
def read(path: pathlib.Path) -> tuple[dict[str, Any], ...]:
    """The entries of a file; none if it is not there."""
    return tuple(json.loads(path.read_text("utf-8"))) if path.exists() else ()
