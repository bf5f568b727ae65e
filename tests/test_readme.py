"""The README keeps its promises: its tables are current and its Python runs."""

import dataclasses
import pathlib
import re

from jaxinfer.engine_config import EngineConfig
from tools import readme_tables

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_tables_are_those_that_the_command_makes():
    text = README.read_text(encoding="utf-8")
    assert readme_tables.with_tables(text) == text, f"run {readme_tables.COMMAND}"


def test_the_table_is_of_the_tests_that_there_are():
    table = readme_tables.support()
    assert "no test yet" not in table and " 0 failed |" in table and "`add_request`" in table
    for path in set(re.findall(r"`(tests/.*?)`", table)):
        assert (README.parent / path).exists(), path


def test_the_first_commands_output_can_be_rewritten():
    text = README.read_text(encoding="utf-8")
    begin = f"<!-- first run: {readme_tables.FIRST_RUN_COMMAND} -->\n"
    rewritten = readme_tables.with_block(text, "first run", readme_tables.FIRST_RUN_COMMAND, r"new \1 output")
    assert begin + "new \\1 output\n<!-- end of first run -->" in rewritten
    assert readme_tables.fold("0%\r50%\rdone\n" + "story " * 200) == "\n".join(
        ["done", "story " * 18 + "story", "story " * 18 + "story", "story " * 17 + "story [...]"]
    )


def test_the_python_example_runs(capsys):
    """In six lines or so, as the README gives it, with the demonstration model."""
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    exec(example[1], {})
    printed = capsys.readouterr().out
    assert "Once upon a time" in printed and "The old king" in printed
    assert len(printed) > 100


def test_the_first_screen_has_the_two_commands():
    first_screen = README.read_text(encoding="utf-8").splitlines()[:12]
    assert 'pip install -e . && run_inference --prompt="Once upon a time"' in first_screen
    assert 'pip install -e ".[test]" && pytest -n 2' in first_screen


def test_processes_of_a_job_are_given_the_same_engine():
    """Or they refuse to start: what only one of the commands has is no field of the engine's."""
    commands = re.findall(r"^run_inference \$job (.*?)&?$", README.read_text(encoding="utf-8"), re.MULTILINE)
    flags = {flag for command in commands for flag in re.findall(r"--(\w+)", command)}
    assert len(commands) == 2 and "process_id" in flags
    assert not flags & {field.name for field in dataclasses.fields(EngineConfig)}
