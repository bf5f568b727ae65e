"""The README keeps its promises: its tables are current and its Python runs."""

import pathlib
import re

from tools import readme_tables

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_tables_are_those_that_the_command_makes():
    text = README.read_text()
    assert readme_tables.with_tables(text) == text, f"run {readme_tables.COMMAND}"


def test_the_python_example_runs(capsys):
    """In six lines or so, as the README gives it, with the demonstration model."""
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    exec(example[1], {})
    printed = capsys.readouterr().out
    assert "Once upon a time" in printed and "The old king" in printed
    assert len(printed) > 100


def test_the_first_screen_has_the_two_commands():
    first_screen = README.read_text().splitlines()[:12]
    assert 'pip install -e . && run_inference --prompt="Once upon a time"' in first_screen
    assert 'pip install -e ".[test]" && pytest -n 2' in first_screen
