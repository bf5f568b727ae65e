"""The wheel has every file of the packages, under the names that they have in a checkout, and nothing else."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.test_import_layers import imports_of

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("jaxinfer", "pallas_kernels", "sharding_rules")
SOURCES = (*PACKAGES, "tools", "configs", "pyproject.toml", "README.md", "LICENSE")  # jaxinfer links to two of them


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built as pip builds it, but with the setuptools that is here, from a copy: the build leaves files behind."""
    pytest.importorskip("setuptools", reason='needs pip install -e ".[test]"')
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


def distributions(folders: tuple[str, ...]) -> set[str]:
    """What the files in these folders import of others, by the names that pip has for it."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    names = {name.partition(".")[0] for file in files for name in imports_of(file)}
    names -= {*sys.stdlib_module_names, *PACKAGES, "tools"}
    known = {"llama_cpp": ["llama-cpp-python"], **importlib.metadata.packages_distributions()}
    return {distribution.replace("_", "-") for name in names for distribution in known.get(name, [name])}


def required(lines: list[str]) -> set[str]:
    return {re.split(r"[\[<>=,;]", line)[0] for line in lines}


def test_what_is_imported_is_what_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core, extras = required(project["dependencies"]), project["optional-dependencies"]
    assert distributions(PACKAGES) == core - {"jinja2"} | required(extras["kubernetes"]) | required(extras["viz"])
    of_tools = core.union(*(required(extras[name]) for name in ("train", "parity", "viz", "bench")))
    assert distributions(("tools",)) <= of_tools and of_tools - core <= distributions(("tools",))


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
