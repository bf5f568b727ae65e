"""The wheel has every file of the packages, under the names that they have in a checkout, and nothing else."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("jaxinfer", "pallas_kernels", "sharding_rules")
SOURCES = (*PACKAGES, "tools", "configs", "pyproject.toml", "README.md", "LICENSE")  # jaxinfer links to two of them


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built as pip builds it, but with the setuptools that is here, from a copy: the build leaves files behind."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(output)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = output.glob("*.whl")
    return zipfile.ZipFile(path)


def test_no_file_is_forgotten(wheel: zipfile.ZipFile):
    """A new package is found by itself, but files that are not Python are listed in pyproject.toml."""
    expected = {
        str(pathlib.Path(folder, file).relative_to(ROOT))
        for package in PACKAGES
        for folder, _, files in os.walk(ROOT / package, followlinks=True)
        for file in files
        if "__pycache__" not in folder
    }
    assert {"jaxinfer/configs/demo_eight_devices.toml", "jaxinfer/demo_model/model.safetensors"} <= expected
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_an_install_finds_tools_configs_and_the_demonstration_model(wheel: zipfile.ZipFile, tmp_path: pathlib.Path):
    """And puts no package called `tools` where others have theirs."""
    wheel.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = """if True:
        import importlib.resources, importlib.util, jaxinfer.resolve
        print(importlib.util.find_spec("jaxinfer.tools.train_demo_model").origin)
        print(importlib.resources.files("jaxinfer.configs") / "demo_eight_devices.toml")
        print(jaxinfer.resolve.DEMO_MODEL / "config.json")
        assert importlib.util.find_spec("tools") is None
    """
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        assert line.startswith(f"{tmp_path}/site/jaxinfer/") and pathlib.Path(line).exists()
    assert len(result.stdout.splitlines()) == 3
