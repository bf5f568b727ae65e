"""How the program ends when its reader leaves, its user interrupts it or its terminal cannot show a character."""

import json
import pathlib
import signal
import subprocess
import time

import pytest

from tests import tiny_model
from tests.command_line import COMMAND, environment, run


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run that goes on for minutes unless it is ended."""
    directory = tmp_path_factory.mktemp("models")
    model_dir = tiny_model.make(directory / "tiny", with_tokenizer=True)
    (directory / "prompts.txt").write_text("abc\n" * 20_000, encoding="utf-8")
    small = ["--max_model_len=32", "--max_num_seqs=2"]
    return [f"--model={model_dir}", f"--prompts_file={directory / 'prompts.txt'}", *small]


def start(flags: list[str]) -> subprocess.Popen[bytes]:
    # A shell's background job, as CI may be, ignores interrupts, and the program would inherit that.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([*COMMAND, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_an_interrupt_ends_in_a_line_and_keeps_what_is_finished(flags: list[str], tmp_path: pathlib.Path):
    partial = tmp_path / "out.jsonl.partial"
    with start([*flags, f"--output_file={tmp_path / 'out.jsonl'}"]) as process:
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    lines = [json.loads(line) for line in partial.read_text(encoding="utf-8").splitlines()]
    assert process.returncode == 130, stderr
    assert stderr.decode().splitlines()[-2:] == [
        f"the {len(lines)} outputs that were finished are in {partial}",
        "run_inference: interrupted",
    ]
    assert b"Traceback" not in stderr and not (tmp_path / "out.jsonl").exists()


def test_a_reader_that_has_enough_ends_the_run_quietly(flags: list[str]):
    with start(flags) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1) == b"a"  # as head -c 1 does
        process.stdout.close()
        stderr = process.stderr.read().decode()
        assert process.wait(timeout=60) == 141
    assert stderr.splitlines()[-1].startswith("sampling: ")


def test_an_ascii_terminal_gets_escapes_and_the_run_goes_on(flags: list[str]):
    result = run(flags[0], *flags[2:], "--max_tokens=1", stdin="é\n", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("\\xe9")
