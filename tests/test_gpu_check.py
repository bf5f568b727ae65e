"""`tools/gpu_check.sh`, with tiny sizes: what a machine with a GPU is to run must not fail there over a flag."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from tests.long_campaign import only_long

ROOT = pathlib.Path(__file__).parents[1]


def check(root: pathlib.Path, folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [root / "tools" / "gpu_check.sh", "--quick", folder]
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@only_long  # and a step of .ci/run: it takes minutes
def test_every_step_passes_and_leaves_its_record(tmp_path: pathlib.Path):
    result = check(ROOT, tmp_path / "out")
    assert result.returncode == 0 and "7 of 7 steps passed" in result.stdout, result.stdout + result.stderr
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert set(records) == {"kernels", "kernels_int8", "experts", "sampling", "decode", "decode_xla"}
    assert all(record["versions"]["jax"] == jax.__version__ for record in records.values())
    assert {"triton", "xla", "cache_write"} < set(records["kernels"]["results"][0])
    assert [row["batch_size"] for row in records["decode"]["results"]] == [1]


@pytest.fixture
def broken(tmp_path: pathlib.Path) -> pathlib.Path:
    """The script where there is nothing else."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "gpu_check.sh", tmp_path / "tools")
    return tmp_path


def test_a_step_that_fails_stops_no_other_and_is_told(broken: pathlib.Path):
    result = check(broken, broken / "out")
    assert result.returncode != 0 and "0 of 7 steps passed" in result.stdout
    assert "kernels: failed with exit status 2" in result.stdout and "No such file" in result.stdout
    assert not [*(broken / "out").glob("*.json")]


def test_a_step_that_hangs_is_ended(broken: pathlib.Path):
    slow = broken / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    script = broken / "tools" / "gpu_check.sh"
    script.write_text(script.read_text().replace('timeout --kill-after=5 "$limit"', "timeout 0.1"))
    result = check(broken, broken / "out", PYTHON=str(slow))
    assert result.returncode == 124 and "decode_xla: not done after 600 s" in result.stdout
