"""Progress lines: what a terminal shows and what a log keeps."""

import sys

import pytest

from jaxinfer.progress import Progress


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
