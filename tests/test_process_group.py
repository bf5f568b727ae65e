"""Whoever ends, ends all: by real processes and connections, without devices."""

import socket
import sys
import textwrap
import time

import pytest

from jaxinfer import frames
from tests import local_processes, process_group_worker

GONE_S = 5.0  # generous: a busy machine; nothing here waits for a limit but silence
SILENCE_S = 1.5


def run(
    *deeds: str, timeout_s: float = 30.0, leave_out: int | None = None
) -> tuple[list[int | None], list[str], float]:
    """Exit codes and stderr of a process per deed, and how long after the start of them all the last one ended.

    `leave_out` is a process that will not end.
    """
    port = str(local_processes.free_port())
    worker = [sys.executable, "-m", "tests.process_group_worker", port, str(len(deeds))]
    commands = [[*worker, str(index), str(timeout_s), deed] for index, deed in enumerate(deeds)]
    with local_processes.started(commands) as processes:
        local_processes.wait_until(lambda: all("\n" in one.stdout for one in processes), processes, 30.0)
        start = time.monotonic()
        ending = [one for index, one in enumerate(processes) if index != leave_out]
        local_processes.wait(ending, timeout_s + GONE_S)
        seconds = max(one.end_time - start for one in ending if one.end_time)
        assert {one.stdout for one in processes} == {f"{[*range(len(deeds))]}\n"}
        return [one.process.poll() for one in processes], [one.stderr for one in processes], seconds


def test_a_follower_that_dies_ends_all():
    codes, stderr, seconds = run("wait", "die", "wait")
    assert codes == [1, -9, 1] and seconds < GONE_S
    for index in (0, 2):
        assert stderr[index].startswith(f"process {index} of 3: process 1 of 3 is gone: "), stderr
        assert stderr[index].endswith("; the job ends\n") and stderr[index].count("\n") == 1


def test_a_leader_that_dies_ends_all():
    codes, stderr, seconds = run("die", "wait", "wait")
    assert codes == [-9, 1, 1] and seconds < GONE_S
    for index in (1, 2):
        assert stderr[index].startswith(f"process {index} of 3: process 0 of 3 is gone: "), stderr


@pytest.mark.parametrize("silent", [0, 1])
def test_silence_ends_all(silent: int):
    """Of a machine without power, or of a process that was stopped: there is no end of a connection to see."""
    deeds = ["stop" if index == silent else "wait" for index in range(2)]
    codes, stderr, seconds = run(*deeds, timeout_s=SILENCE_S, leave_out=silent)
    assert codes[1 - silent] == 1 and SILENCE_S * 0.5 < seconds < SILENCE_S + GONE_S
    assert stderr[1 - silent].endswith(f"process {silent} of 2 has been silent for 1.5 s; the job ends\n")


def test_heartbeats_keep_idle_processes_together():
    """Longer than the limit nobody has anything to say."""
    codes, stderr, seconds = run("wait", "wait", "leave after 3 s", timeout_s=SILENCE_S)
    assert codes == [1, 1, 0] and seconds > 2 * SILENCE_S - 0.5
    assert "process 2 of 3 is gone" in stderr[0] and "process 2 of 3 is gone" in stderr[1]


def test_a_follower_that_leaves_before_the_work_is_done_ends_all():
    codes, stderr, seconds = run("wait", "leave")
    assert codes == [1, 0] and seconds < GONE_S
    assert stderr[0] == "process 0 of 2: process 1 of 2 is gone: its connection was closed; the job ends\n"


def test_who_fails_tells_the_others_why():
    codes, stderr, seconds = run("wait", "abort", "wait")
    assert codes == [1, 3, 1] and seconds < GONE_S
    assert [stderr[index] for index in (0, 2)] == [
        f"process {index} of 3: the model is broken; the job ends\n" for index in (0, 2)
    ]


@pytest.mark.parametrize("deed", ["die, and nobody can be told", "die, and nobody listens"])
def test_who_cannot_write_why_it_ends_tells_the_others_and_ends(deed: str):
    """Its stderr is a file on a full disk, or a pipe whose reader has stalled."""
    codes, stderr, seconds = run("wait", deed)
    assert codes == [1, 1] and seconds < GONE_S
    assert stderr[0] == "process 0 of 2: the model is broken; the job ends\n"


def test_who_has_no_stdout_tells_the_others_and_ends():
    codes, stderr, seconds = run("wait", "abort, without stdout")
    assert codes == [1, 3] and seconds < GONE_S
    assert stderr == ["process 0 of 2: the model is broken; the job ends\n", ""]


def test_nothing_keeps_a_process_from_its_end():
    """An interrupt on the way, neither."""
    codes, stderr, seconds = run("wait", "abort, interrupted")
    assert codes == [1, 3] and seconds < GONE_S
    assert stderr[1] == ""


def test_who_is_told_of_the_end_before_it_is_ready_passes_it_on():
    """The word is there before the first thread listens, and the constructor goes on slowly after each it starts."""
    code = """
        import select, socket, sys, threading, time
        from jaxinfer.process_group import ProcessGroup

        connections = {peer: socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for peer in (1, 2)}
        select.select([connections[1]], [], [])
        start = threading.Thread.start
        threading.Thread.start = lambda self: (start(self), time.sleep(0.5))
        ProcessGroup(0, 3, connections, 30.0)
        time.sleep(60)
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", textwrap.dedent(code), str(server.getsockname()[1])]
        with local_processes.started([command]) as [process], server.accept()[0] as first, server.accept()[0] as second:
            first.sendall(frames.encode(frames.Kind.FATAL, "the model is broken"))
            second.settimeout(30)
            assert frames.read(frames.reader(second)) == (frames.Kind.FATAL, "the model is broken", [])
            local_processes.wait([process], GONE_S)
            assert process.process.returncode == 1
            assert process.stderr == "process 0 of 3: the model is broken; the job ends\n"


def test_who_comes_late_finds_the_others_together():
    """Later than they may be silent, once they are a group."""
    assert process_group_worker.LATE_S > 1.5 * SILENCE_S
    codes, stderr, _ = run("close", "follow", "come late, follow", timeout_s=SILENCE_S)
    assert codes == [0, 0, 0] and stderr == ["", "", ""]


def test_what_is_no_frame_ends_all():
    codes, stderr, _ = run("wait", "garble")
    assert codes == [1, 1]
    assert "process 1 of 2 sent what cannot be read: no frame of this protocol: it starts with b'GET '" in stderr[0]


def test_processes_at_different_points_end():
    codes, stderr, _ = run("gather compiled", "gather loaded")
    assert codes == [1, 1]
    why = 'process 0 of 2 is at "gather compiled" and process 1 of 2 is at "gather loaded"; the job ends\n'
    assert stderr == [f"process 0 of 2: {why}", f"process 1 of 2: {why}"]


def test_a_process_that_lives_and_does_not_answer_ends_all():
    codes, stderr, seconds = run("no answer", "wait")
    assert codes == [1, 1] and seconds < GONE_S
    assert 'process 1 of 2 has not answered "answer" for 0.2 s' in stderr[0]


@pytest.mark.parametrize("leader", ["close", "leave"])
def test_work_that_is_done_ends_in_order(leader: str):
    """Also where process 0 ends without a word, as a script without `with` does."""
    codes, stderr, _ = run(leader, "follow", "follow")
    assert codes == [0, 0, 0] and stderr == ["", "", ""]


def test_who_has_left_cannot_be_called_back():
    codes, stderr, _ = run("close, gather", "follow")
    assert codes == [1, 0] and "process 1 of 2 is gone" in stderr[0]
