"""The tools start, from a checkout and as modules of the installed package, and their parts do what they say."""

import itertools
import os
import pathlib
import subprocess
import sys

import pytest

from jaxinfer import models
from jaxinfer.tools import parallel_matrix, parallel_runs
from tests.long_campaign import chosen

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = [path.stem for path in sorted((ROOT / "tools").glob("*.py")) if "__main__" in path.read_text("utf-8")]


def run(directory: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python program, started where nothing but an install of this checkout (or its stand-in) is in sight."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_there_are_programs():
    assert {"bench_decode", "readme_tables", "train_demo_model"} <= set(PROGRAMS)


@pytest.mark.parametrize(
    ("name", "way"),
    chosen(
        [*itertools.product(PROGRAMS, ("script", "module"))],
        *((name, "module") for name in PROGRAMS),
        ("bench_decode", "script"),
    ),
)
def test_help(tmp_path: pathlib.Path, name: str, way: str):
    if name == "train_demo_model":
        pytest.importorskip("optax", reason='needs pip install -e ".[train]"')
    start = [str(ROOT / "tools" / f"{name}.py")] if way == "script" else ["-m", f"jaxinfer.tools.{name}"]
    result = run(tmp_path, *start, "--help")
    assert f"{name}.py" in result.stdout and "Traceback" not in result.stderr, result.stderr


def test_a_schedule_needs_steps_to_rise_and_fall(tmp_path: pathlib.Path):
    pytest.importorskip("optax", reason='needs pip install -e ".[train]"')
    flags = ["--text=t", "--output=o", "--work_dir=w", "--steps=549", "--decay_steps=500"]
    result = run(tmp_path, "-m", "jaxinfer.tools.train_demo_model", *flags)
    assert result.returncode != 0 and "--steps must be at least --decay_steps + 50" in result.stderr


def test_the_card_has_the_facts_that_were_measured():
    from jaxinfer.tools import demo_model_card

    facts = {"num_params": 1, "vocab_size": 2222, "context": 333, "short_window": 44, "steps": 5, "batch_tokens": 6666}
    facts |= {"epochs": 7.0, "train_tokens": 8, "held_out_tokens": 9, "dtype": "int3", "perplexity": 10.0}
    card = demo_model_card.render(facts, ["Once\n\nupon"])
    for text in (
        "2,222 tokens",
        "steps of 6,666 tokens",
        "44 tokens,\nat the end of 333",
        "Stored in int3",
        "> Once\n>\n",
    ):
        assert text in card


def test_the_matrix_has_every_schedule_and_tells_what_was_refused():
    ways = parallel_matrix.ways()
    assert tuple(parallel_runs.SCHEDULES) == parallel_matrix.FEATURES
    assert len({*map(str, ways)}) == len(ways)
    record = {
        parallel_matrix.key("llama", way, feature): {"outcome": "equal", "reason": ""}
        for way in ways[:2]
        for feature in parallel_matrix.FEATURES
    }
    first, *_ = record
    record[first] = {"outcome": "failed", "reason": "output 0 differs"}
    for feature in parallel_matrix.FEATURES:
        refused = {"outcome": "refused", "reason": "--mesh=expert:2: llama has no experts here"}
        record[parallel_matrix.key("llama", parallel_matrix.Way("expert:2"), feature)] = refused
    assert parallel_matrix.counts(record) == "12 combinations, 7 equal, 4 refused, 1 failed"
    lines = parallel_matrix.table(record, ["llama"]).splitlines()
    assert {"| one device | 3/4 |", "| data:2 | 4/4 |", "| expert:2 | no [1] |", "| context:2 |  |"} <= set(lines)
    assert lines[-1] == "[1] --mesh=expert:2: llama has no experts here"


def test_the_published_matrix_is_whole_and_its_table_is_of_its_record():
    record = parallel_matrix.read_record(ROOT / "docs" / "parallel_matrix.json")
    everything = itertools.product(models.decoders(), parallel_matrix.ways(), parallel_matrix.FEATURES)
    assert set(record) == {parallel_matrix.key(*combination) for combination in everything}
    assert {entry["outcome"] for entry in record.values()} == {parallel_matrix.EQUAL, parallel_matrix.REFUSED}
    document = (ROOT / "docs" / "parallel_matrix.md").read_text("utf-8")
    assert document == parallel_matrix.document(record, models.decoders())


def test_what_is_accepted_and_does_not_compile_has_failed(monkeypatch: pytest.MonkeyPatch):
    runs = object.__new__(parallel_runs.FamilyRuns)

    def refuse(*_: object) -> None:
        raise ValueError("no such axis")

    monkeypatch.setattr(runs, "_definition", lambda *_: None)
    monkeypatch.setattr(runs, "_runner", refuse)
    assert {*runs.outcomes("tensor:2", "auto").values()} == {("failed", "ValueError: no such axis")}
    monkeypatch.setattr(runs, "_definition", refuse)
    assert {*runs.outcomes("tensor:2", "auto").values()} == {("refused", "no such axis")}
