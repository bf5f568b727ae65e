"""A model family is one file: with its folder in view, the generic tests find it and pass, and nothing else changes."""

import pathlib
import re
import subprocess
import sys

from jaxinfer import models

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "new_family" / "families"
# By file, how many of its tests are of a family.
GENERIC = {
    "tests/test_families.py": 3,
    "tests/test_hf_config.py": 1,
    "tests/test_conversion.py": 1,
    "tests/new_family/check_toy.py": 3,
}


def run_tests(*args: str) -> str:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "toy", *args, *GENERIC]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300, check=False).stdout


def test_the_generic_tests_find_and_pass_it():
    output = run_tests(f"--family-path={FOLDER}")
    passed = re.findall(r"^(\S+?)::\S+ PASSED", output, re.MULTILINE)
    assert {file: passed.count(file) for file in GENERIC} == GENERIC, output
    assert re.search(rf"= {sum(GENERIC.values())} passed, \d+ deselected in ", output), output


def test_without_its_folder_nobody_knows_it():
    """So that the tests above are of that file and not of one in the package."""
    assert "toy" not in models.families()
    assert [path.name for path in FOLDER.glob("*.py")] == ["toy.py"]
