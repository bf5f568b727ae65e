"""Starts the processes of a job on this machine, for tests, and ends those that it started."""

import contextlib
import dataclasses
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from tests.command_line import environment

ROOT = pathlib.Path(__file__).parents[1]
START_S = 240  # for all of a job's processes to import jax, compile and begin, on a busy machine
_POLL_S = 0.02
HERE, AS_IF_FAR = "127.0.0.1", "127.0.0.2"  # the second is an address of this machine that we take for any other


@dataclasses.dataclass
class LocalProcess:
    """A process of a job; what it writes is in files, so that it never waits for a reader."""

    process: subprocess.Popen[bytes]
    stdout_file: pathlib.Path
    stderr_file: pathlib.Path
    end_time: float | None = None  # time.monotonic(), once `wait` has seen its end

    @property
    def stdout(self) -> str:
        return self.stdout_file.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        """Without what Gloo says of its connections."""
        lines = self.stderr_file.read_text(encoding="utf-8").splitlines(keepends=True)
        return "".join(line for line in lines if "[Gloo]" not in line)


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def launch_flags(count: int, host: str = HERE) -> list[list[str]]:
    """Of each of `count` processes, as run_inference takes them."""
    job = [f"--coordinator_address={host}:{free_port()}", f"--num_processes={count}"]
    return [[*job, f"--process_id={index}"] for index in range(count)]


@contextlib.contextmanager
def started(commands: Sequence[Sequence[str]], *, devices_each: int = 1, **env: str) -> Iterator[list[LocalProcess]]:
    """The processes of these commands, with so many CPU devices each; they are killed at the end."""
    flags = environment()["XLA_FLAGS"]
    env = {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices_each}", "PJRT_NPROC": "32"} | env
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes: list[LocalProcess] = []
    # A shell's background job, as CI may be, ignores interrupts, and the processes would inherit that.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as directory:
        try:
            for index, command in enumerate(commands):
                out, err = (pathlib.Path(directory) / f"{index}.{name}" for name in ("out", "err"))
                with out.open("wb") as stdout, err.open("wb") as stderr:
                    process = subprocess.Popen(
                        [*command],
                        stdin=subprocess.DEVNULL,
                        stdout=stdout,
                        stderr=stderr,
                        env=environment(**env),
                        cwd=ROOT,
                    )
                processes.append(LocalProcess(process, out, err))
            signal.signal(signal.SIGINT, inherited)
            yield processes
        finally:
            signal.signal(signal.SIGINT, inherited)
            for one in processes:
                one.process.kill()
                one.process.wait()


def wait(processes: Sequence[LocalProcess], timeout_s: float) -> None:
    """Until all have ended; AssertionError with what they wrote if that takes longer."""
    wait_until(lambda: sum(map(_has_ended, processes)) == len(processes), processes, timeout_s)


def wait_until(is_so: Callable[[], bool], processes: Sequence[LocalProcess], timeout_s: float = START_S) -> None:
    """AssertionError with what `processes` wrote if it does not come to be so."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            told = "\n".join(f"process {i}, {one.process.poll()}:\n{one.stderr}" for i, one in enumerate(processes))
            raise AssertionError(f"not within {timeout_s:g} s\n{told}")
        time.sleep(_POLL_S)


def _has_ended(one: LocalProcess) -> bool:
    if one.end_time is None and one.process.poll() is not None:
        one.end_time = time.monotonic()
    return one.end_time is not None
