"""Who knows the secret of a job is let in, and nobody else."""

import contextlib
import socket
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from jaxinfer import frames, rendezvous
from jaxinfer.frames import Kind

SECRET = bytes(range(32))


class Job:
    """Process 0 of a job of two, which waits for process 1."""

    def __init__(self):
        self.said: list[str] = []
        self.server = rendezvous.listen(only_here=True)
        self.port: int = self.server.getsockname()[1]
        pool = ThreadPoolExecutor(1)
        self.accepted: Future[dict[int, socket.socket]] = pool.submit(
            rendezvous.accept, self.server, 2, SECRET, self.said.append
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
        with rendezvous.connect(["127.0.0.1"], self.port, 1, SECRET):
            for connection in self.accepted.result(timeout=10).values():
                connection.close()


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
    assert len(job.said) == 1


def test_a_process_that_is_there_already_is_refused():
    server, said = rendezvous.listen(only_here=True), []
    port = server.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(rendezvous.accept, server, 3, SECRET, said.append)
        connections = [rendezvous.connect(["127.0.0.1"], port, index, SECRET) for index in (1, 1, 2)]
        for connection in [*accepted.result(timeout=10).values(), *connections]:
            connection.close()
    assert said == ["refused a connection from 127.0.0.1: process 1 is connected already"]


def test_who_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendezvous, "_CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(RuntimeError, match=r"processes 1, 2 of 3 have not connected in 0\.2 s"):
        rendezvous.accept(rendezvous.listen(only_here=True), 3, SECRET, print)


def test_the_first_name_that_answers_is_taken():
    job = Job()
    with rendezvous.connect(["no-such-host.invalid", "127.0.0.1"], job.port, 1, SECRET):
        for connection in job.accepted.result(timeout=10).values():
            connection.close()


def test_who_cannot_be_reached_is_named():
    with rendezvous.listen(only_here=True) as server:
        port = server.getsockname()[1]
    with pytest.raises(RuntimeError, match=rf"process 0 cannot be reached at port {port} of 127\.0\.0\.1: Connection"):
        rendezvous.connect(["127.0.0.1"], port, 1, SECRET)
