"""Who knows the secret of a job is let in, and nobody else."""

import contextlib
import socket
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import pytest

from jaxinfer import frames, rendezvous
from jaxinfer.frames import Kind

SECRET = bytes(range(32))
LIMIT_S = 20.0


class Job:
    """Process 0, which waits for the others of its job."""

    def __init__(self, count: int = 2):
        self.said: list[str] = []
        self.server = rendezvous.listen(only_here=True)
        self.port: int = self.server.getsockname()[1]
        pool = ThreadPoolExecutor(1)
        self.accepted: Future[dict[int, socket.socket]] = pool.submit(
            rendezvous.accept, self.server, count, SECRET, LIMIT_S, self.said.append
        )
        pool.shutdown(wait=False)

    def try_hello(self, hello: bytes) -> None:
        """Returns when it was refused."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(hello)
            with contextlib.suppress(ConnectionResetError):  # where not all of it was read
                assert connection.recv(1) == b""

    def connect(self) -> None:
        """As process 1 does, with the secret."""
        with connect(self.port, 1):
            for connection in self.accepted.result(timeout=10).values():
                connection.close()


def connect(port: int, index: int, limit_s: float = LIMIT_S) -> socket.socket:
    return rendezvous.connect(["127.0.0.1"], port, index, SECRET, limit_s)


@pytest.mark.parametrize(
    ("hello", "problem"),
    [
        (frames.encode(Kind.HELLO, {"process": 1, "secret": "00" * 32}), "it does not know the secret of this job"),
        (frames.encode(Kind.HELLO, {"process": 1}), "it does not know the secret of this job"),
        (frames.encode(Kind.HELLO, [1, SECRET.hex()]), "it does not know the secret of this job"),
        (frames.encode(Kind.STEP, {"process": 1, "secret": SECRET.hex()}), "it does not know the secret of this job"),
        (frames.encode(Kind.HELLO, {"process": 2, "secret": SECRET.hex()}), "it says that it is process 2 of 2"),
        (frames.encode(Kind.HELLO, {"process": "1", "secret": SECRET.hex()}), "it says that it is process '1' of 2"),
        (b"GET / HTTP/1.1\r\n\r\n", "no frame of this protocol"),
        (frames.encode(Kind.HELLO, "x" * 2000), "larger than 1024"),
    ],
)
def test_who_does_not_know_the_secret_is_refused(hello: bytes, problem: str):
    job = Job()
    job.try_hello(hello)
    job.connect()
    assert job.accepted.result().keys() == {1}
    [said] = job.said
    assert said.startswith("refused a connection from 127.0.0.1: ") and problem in said


def test_who_says_nothing_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendezvous, "_HELLO_TIMEOUT_S", 0.1)
    job = Job()
    job.try_hello(b"")
    job.connect()
    assert job.said == ["refused a connection from 127.0.0.1: it has not said who it is in 0.1 s"]


def test_who_leaves_without_a_word_is_refused():
    job = Job()
    socket.create_connection(("127.0.0.1", job.port)).close()
    job.connect()
    assert job.said == ["refused a connection from 127.0.0.1: its connection was closed"]


def test_who_never_ends_its_hello_is_refused(monkeypatch: pytest.MonkeyPatch):
    """However steadily its bytes come."""
    monkeypatch.setattr(rendezvous, "_HELLO_TIMEOUT_S", 0.3)
    job = Job()
    hello = frames.encode(Kind.HELLO, "x" * 900)
    with socket.create_connection(("127.0.0.1", job.port)) as connection, contextlib.suppress(ConnectionError):
        for i in range(len(hello) - 1):
            connection.sendall(hello[i : i + 1])
            time.sleep(0.02)
    job.connect()
    assert job.said == ["refused a connection from 127.0.0.1: it has not said who it is in 0.3 s"]


def test_nobody_waits_for_who_says_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendezvous, "_HELLO_TIMEOUT_S", 60.0)
    job = Job()
    with socket.create_connection(("127.0.0.1", job.port)) as silent:
        job.connect()
        silent.settimeout(10)
        assert silent.recv(1) == b""  # and it is not left open
    assert job.said == []


def test_all_are_let_in_at_once():
    """So nobody hears from process 0, or expects to, before it hears all."""
    job = Job(3)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(connect, job.port, 1)
        with pytest.raises(TimeoutError):
            first.result(timeout=0.3)
        second = pool.submit(connect, job.port, 2)
        for connection in [first.result(timeout=10), second.result(timeout=10)]:
            connection.close()
        for connection in job.accepted.result(timeout=10).values():
            connection.close()


def test_a_process_that_is_there_already_is_refused():
    job = Job(3)
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(connect, job.port, 1) for _ in range(2)]
        refused, _ = wait(results, timeout=10, return_when=FIRST_COMPLETED)
        with pytest.raises(RuntimeError, match="process 0 did not let process 1 in: its connection was closed"):
            refused.pop().result()
        results.append(pool.submit(connect, job.port, 2))
        connections = [result.result(timeout=10) for result in results if result.exception(timeout=10) is None]
        assert len(connections) == 2
        for connection in [*job.accepted.result(timeout=10).values(), *connections]:
            connection.close()
    assert job.said == ["refused a connection from 127.0.0.1: process 1 is connected already"]


def test_who_is_missing_is_named_everywhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendezvous, "_CONNECT_TIMEOUT_S", 0.5)
    job, why = Job(4), r"processes 1, 3 of 4 have not connected in 0\.5 s"
    with pytest.raises(RuntimeError, match=f"process 0 did not let process 2 in: {why}"):
        connect(job.port, 2)
    with pytest.raises(RuntimeError, match=f"^{why}"):
        job.accepted.result(timeout=10)


def test_different_heartbeat_limits_are_refused_everywhere():
    """A process that sends by one limit and expects by another ends a job that is well."""
    job, why = Job(3), r"--heartbeat_timeout_s is 20\.0 in process 0 and 5 in process 2; give all processes the same"
    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(connect, job.port, 1), pool.submit(connect, job.port, 2, 5)]:
            with pytest.raises(RuntimeError, match=why):
                result.result(timeout=10)
    with pytest.raises(RuntimeError, match=why):
        job.accepted.result(timeout=10)


def test_the_end_of_process_0_is_noticed_at_once():
    with rendezvous.listen(only_here=True) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connect, server.getsockname()[1], 1)
        server.accept()[0].close()
        with pytest.raises(RuntimeError, match="process 0 did not let process 1 in: "):
            waiting.result(timeout=10)


def test_the_first_name_that_answers_is_taken():
    job = Job()
    with rendezvous.connect(["no-such-host.invalid", "127.0.0.1"], job.port, 1, SECRET, LIMIT_S):
        for connection in job.accepted.result(timeout=10).values():
            connection.close()


def test_who_cannot_be_reached_is_named():
    with rendezvous.listen(only_here=True) as server:
        port = server.getsockname()[1]
    with pytest.raises(RuntimeError, match=rf"process 0 cannot be reached at port {port} of 127\.0\.0\.1: Connection"):
        connect(port, 1)
