"""Runs `run_inference` for tests: as a program, or much faster within this process."""

import contextlib
import os
import subprocess
import sys
from typing import Any

import pytest
from absl.testing import flagsaver

import jaxinfer.engine
from jaxinfer import Engine, cli_flags, run_inference
from jaxinfer.compilation_cache import keep_no_programs

COMMAND = [sys.executable, "-m", "jaxinfer.run_inference"]


def environment(**changes: str) -> dict[str, str]:
    """This process's, without its eight virtual devices."""
    others = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    inherited = {key: value for key, value in os.environ.items() if key != "PJRT_NPROC"}
    return inherited | {"XLA_FLAGS": " ".join(others)} | changes


def run(*flags: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *flags],
        capture_output=True,
        encoding="utf-8",
        input=stdin,
        env=environment(**env),
        timeout=300,
        check=False,
    )


def run_here(*flags: str) -> int:
    """The exit code of the command in this process, which has eight virtual devices."""
    with flagsaver.flagsaver():
        try:
            return run_inference.main(cli_flags.parse(["run_inference", *flags]))
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        finally:
            keep_no_programs()  # which the command keeps for all engines of the process


def with_engine(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> list[dict[str, Any]]:
    """Makes the command use `engine`, which stays open; the fields that it asks for are added to the list."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        jaxinfer.engine, "Engine", lambda **fields: asked.append(fields) or contextlib.nullcontext(engine)
    )
    return asked
