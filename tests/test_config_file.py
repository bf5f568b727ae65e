"""--config: flags from a TOML file, below those of the command line, and refused as those are."""

import pathlib

import pytest

from jaxinfer import Engine, devices
from tests import tiny_model
from tests.command_line import run_here, with_engine

DEMO = pathlib.Path(__file__).parents[1] / "configs" / "demo_eight_devices.toml"  # the others: tests/test_presets.py


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    model_dir = tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")
    with Engine(str(model_dir), max_num_seqs=2, max_model_len=64, decode_steps=2) as engine:
        yield engine


def test_the_demonstration_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """On a tiny model. This process has its eight devices, so that only the wish for them is looked at."""
    counts: list[int] = []
    asked = with_engine(monkeypatch, engine)
    monkeypatch.setattr(devices, "set_num_cpu_devices", counts.append)
    assert run_here(f"--config={DEMO}", "--max_tokens=3") == 0, capsys.readouterr().err
    assert counts == [8] and asked[0]["mesh"] == "data:2,tensor:4"
    captured = capsys.readouterr()
    assert "temperature=0.0" in captured.err and "max_tokens=3\n" in captured.err
    assert captured.out.startswith("Once upon a time") and "\n\nThe old king" in captured.out


def test_the_command_line_overrides_the_file_and_the_file_the_default(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
):
    path = tmp_path / "run.toml"
    path.write_text('max_tokens = 9\ntop_k = 3\nprompt = ["file"]\nstop = ["é"]\nchat = false\n', encoding="utf-8")
    with_engine(monkeypatch, engine)
    assert run_here(f"--config={path}", "--max_tokens=2", "--prompt=line") == 0
    captured = capsys.readouterr()
    assert "top_k=3" in captured.err and "max_tokens=2," in captured.err and "stop=('é',)" in captured.err
    assert captured.out.startswith("line") and "file" not in captured.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_tokns = 5", "unknown key 'max_tokns'; did you mean 'max_tokens'?"),
        ("[engine]\nseed = 1", "unknown key 'engine'"),
        ('config = "other.toml"', "unknown key 'config'"),
        ('flagfile = "other.txt"', "unknown key 'flagfile'"),
        ("max_tokens = 5.5", "flag --max_tokens=5.5: Expect argument to be a string or int"),
        ("max_tokens = true", "flag --max_tokens=True: Expect argument to be a string or int"),
        ("num_cpu_devices = 0", "flag --num_cpu_devices=0: 0 is not a positive integer"),
        ("mesh = 8", "flag --mesh=8: flag value must be a string, found \"<class 'int'>\""),
        ("chat = 2", "flag --chat=2: "),
        ("seed = five", "Invalid value (at line 1, column 8)"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], text: str, message: str
):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    assert run_here(f"--config={path}", "--prompt=abc") == 1
    assert capsys.readouterr().err.startswith(f"run_inference: error: --config={path}: {message}")


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert run_here("--config=/nowhere.toml", "--prompt=abc") == 1
    assert capsys.readouterr().err == "run_inference: error: --config=/nowhere.toml: No such file or directory\n"
