"""Whichever process of a job dies, all others end within the heartbeat limit and say why; none waits for ever."""

import contextlib
import pathlib
import signal
import time

import pytest

from tests import local_processes, tiny_model
from tests.command_line import COMMAND
from tests.local_processes import LocalProcess
from tests.long_campaign import IS_LONG, chosen

NUM_PROCESSES = 4 if IS_LONG else 2
VICTIM = NUM_PROCESSES // 2
HEARTBEAT_TIMEOUT_S = 5
ABORTED_BY_JAX = -signal.SIGABRT  # which may notice the end of process 0 before we do


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run that goes on for minutes unless it is ended."""
    directory = tmp_path_factory.mktemp("models")
    model_dir = tiny_model.make(directory / "tiny")
    (directory / "prompts.txt").write_text("abc\n" * 50_000, encoding="utf-8")
    run = [f"--model={model_dir}", f"--prompts_file={directory / 'prompts.txt'}", "--max_model_len=32"]
    job = [f"--mesh=data:{NUM_PROCESSES}", f"--max_num_seqs={NUM_PROCESSES}", "--decode_steps=1"]
    return [*run, *job, f"--heartbeat_timeout_s={HEARTBEAT_TIMEOUT_S}"]


def wait_for_output(processes: list[LocalProcess], partial: pathlib.Path) -> None:
    local_processes.wait_until(lambda: partial.exists() and partial.stat().st_size > 0, processes)


def start(flags: list[str], directory: pathlib.Path) -> contextlib.AbstractContextManager[list[LocalProcess]]:
    output = f"--output_file={directory / 'out.jsonl'}"
    launches = local_processes.launch_flags(NUM_PROCESSES)
    return local_processes.started([[*COMMAND, *flags, output, *launch] for launch in launches])


@pytest.mark.parametrize(
    ("victim", "how"),
    chosen(
        [(victim, how) for victim in (VICTIM, 0) for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)],
        (VICTIM, signal.SIGTERM),
        (0, signal.SIGKILL),
    ),
)
def test_all_end(victim: int, how: signal.Signals, flags: list[str], tmp_path: pathlib.Path):
    """Whatever they wait for; the records that were finished are kept unless process 0 could not."""
    with start(flags, tmp_path) as processes:
        wait_for_output(processes, tmp_path / "out.jsonl.partial")
        killed = time.monotonic()
        processes[victim].process.send_signal(how)
        survivors = [one for index, one in enumerate(processes) if index != victim]
        local_processes.wait(survivors, HEARTBEAT_TIMEOUT_S + 5)
        seconds = [one.end_time - killed for one in survivors if one.end_time]
        print(f"{how.name} to process {victim}: the others had ended after {', '.join(f'{s:.2f}' for s in seconds)} s")
        for one in survivors:
            assert one.process.returncode in (1, ABORTED_BY_JAX), one.stderr
            reasons = [f"process {victim} of {NUM_PROCESSES} {why}" for why in ("is gone: ", "has been silent for 5 s")]
            reasons += ["the JAX distributed service detected fatal errors"] if victim == 0 else []
            assert any(reason in one.stderr for reason in reasons), one.stderr


def test_an_interrupt_of_process_0_ends_all_in_order(flags: list[str], tmp_path: pathlib.Path):
    """A terminal interrupts the others as well, and they wait for what process 0 does."""
    partial = tmp_path / "out.jsonl.partial"
    with start(flags, tmp_path) as processes:
        wait_for_output(processes, partial)
        for one in reversed(processes):
            one.process.send_signal(signal.SIGINT)
        local_processes.wait(processes, HEARTBEAT_TIMEOUT_S + 5)
        lines = partial.read_text(encoding="utf-8").splitlines()
        assert [one.process.returncode for one in processes] == [130] + [0] * (NUM_PROCESSES - 1)
        assert processes[0].stderr.splitlines()[-2:] == [
            f"the {len(lines)} outputs that were finished are in {partial}",
            "run_inference: interrupted",
        ]
        for index in range(1, NUM_PROCESSES):
            assert processes[index].stderr == f"process {index} of {NUM_PROCESSES}: follows process 0\n"
