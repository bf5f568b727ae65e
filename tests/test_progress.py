"""Progress lines: what a terminal shows and what a log keeps."""

import dataclasses
import sys
import types

import pytest

from jaxinfer import progress
from jaxinfer.progress import Progress
from tests.fake_runner import make_core


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Time as the test says: `clock.now` in seconds."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_the_bar_counts_of_how_many_and_gives_way_to_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(enabled=True).phase("compiling", "programs") as advance:
        advance(2, 6)
        assert capsys.readouterr().err == "\rcompiling: 2 of 6 programs\033[K"
        advance(6, 6)
    assert "\r\033[Kcompiling: 6 programs in " in capsys.readouterr().err


def test_an_error_does_not_stand_on_the_line_of_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail() -> None:
        with Progress(enabled=True).phase("loading", "bytes") as advance:
            advance(1024, 4096)
            raise ValueError("broken")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(ValueError, match="broken"):
        fail()
    assert capsys.readouterr().err == "\rloading: 1.0 KiB of 4.0 KiB\033[K\n"


def test_without_a_terminal_a_line_at_either_end(capsys: pytest.CaptureFixture[str]):
    with Progress(enabled=True).phase("compiling", "programs") as advance:
        assert capsys.readouterr().err == "compiling ...\n"
        advance(1, 1)
    assert capsys.readouterr().err == "compiling: 1 programs in 0.0 s\n"


def test_nothing_unless_enabled(capsys: pytest.CaptureFixture[str]):
    with Progress(enabled=False).phase("compiling", "programs") as advance:
        advance(1, 1)
    assert capsys.readouterr().err == ""


def test_a_terminal_is_written_to_ten_times_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: types.SimpleNamespace
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(enabled=True).phase("running", "steps") as advance:
        for step in range(1000):
            advance(step, 1000)
            clock.now += 0.001
    assert 9 <= capsys.readouterr().err.count("\rrunning: ") <= 10


def test_a_log_gets_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str], clock: types.SimpleNamespace):
    with Progress(enabled=True).phase("running", "steps") as advance:
        for step in range(25):
            clock.now += 1
            advance(step + 1, 25)
    lines = ["running ...", "running: 10 of 25 steps", "running: 20 of 25 steps", "running: 25 steps in 25.0 s"]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_line_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    with Progress(enabled=True).phase("running", "steps", lambda: "and so on") as advance:
        advance(1, 25)
        assert capsys.readouterr().err == "\rrunning: 1 of 25 st\033[K"


def test_generation_tells_its_speed_and_who_waits(capsys: pytest.CaptureFixture[str], clock: types.SimpleNamespace):
    """Tokens of before do not count, and at the end there is nobody left to tell about."""
    idle = dataclasses.replace(make_core().metrics(0), generation_tokens=50)
    busy = dataclasses.replace(idle, generation_tokens=170, num_running=8, num_waiting=3, kv_cache_usage=0.456)
    snapshots = iter([idle, busy, dataclasses.replace(idle, generation_tokens=210)])
    with Progress(enabled=True).generation(lambda: next(snapshots)) as advance:
        clock.now += 12
        advance(9, 20)
        clock.now += 4
        advance(20, 20)
    assert capsys.readouterr().err.splitlines() == [
        "generating ...",
        "generating: 9 of 20 requests, 10.0 tokens/s, 8 running, 3 waiting, cache 46%",
        "generating: 20 requests in 16.0 s, 10.0 tokens/s",
    ]
