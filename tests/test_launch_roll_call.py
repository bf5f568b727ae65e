"""The processes of a job meet before jax joins them, and nobody else disturbs them; those who do not come are named."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import pytest

from jaxinfer import distributed, roll_call
from jaxinfer.launch import Launch
from tests import local_processes


def launches(count: int, host: str = local_processes.HERE) -> list[Launch]:
    port = local_processes.free_port()
    return [Launch(f"{host}:{port}", count, index) for index in range(count)]


@contextlib.contextmanager
def meeting(*some: Launch, timeout_s: float = 20) -> Iterator[list[Future[None]]]:
    with ThreadPoolExecutor(len(some)) as pool:
        yield [pool.submit(roll_call.meet, launch, timeout_s) for launch in some]


def ask(launch: Launch, text: bytes) -> bytes:
    """What process 0 says to whoever says this."""
    with roll_call._connected(launch, 1e9) as connection:
        connection.sendall(text)
        return connection.recv(200)


@pytest.mark.parametrize("host", [local_processes.HERE, "localhost", local_processes.AS_IF_FAR])
def test_all_meet_and_leave_the_port(host: str):
    job = launches(3, host)
    with meeting(*reversed(job)) as results:
        assert [result.result() for result in results] == [None] * 3
    socket.create_server((host, job[0].port)).close()


def test_others_do_not_hold_it_up():
    """One that says nothing, one that says something else, one that left and came again."""
    job = launches(3)
    with meeting(job[0]) as (leader,), roll_call._connected(job[0], 1e9):
        assert ask(job[0], b"GET / HTTP/1.1\r\n") == b""
        with roll_call._connected(job[0], 1e9) as before:
            before.sendall(b"jaxinfer 1/3\n")
            assert b"another process 1 is there; another job may run there" in ask(job[0], b"jaxinfer 1/3\n")
        with meeting(*job[1:]) as others:
            assert [result.result() for result in (leader, *others)] == [None] * 3


def test_who_does_not_come_is_named():
    job = launches(4)
    with meeting(job[0], job[2], timeout_s=1) as (leader, other):
        with pytest.raises(RuntimeError, match=r"processes 1, 3 of 4 did not come to 127.0.0.1:\d+; start them all"):
            leader.result()
        with pytest.raises(RuntimeError, match=r"process 0 at .* has ended|still waits for other processes"):
            other.result()


def test_no_process_0():
    with pytest.raises(RuntimeError, match="where process 0 should be, cannot be reached: Connection refused"):
        roll_call.meet(launches(2)[1], 0.1)


def test_another_number_of_processes():
    job = launches(2)
    with meeting(job[0]) as (leader,):
        with pytest.raises(RuntimeError, match="was started with --num_processes=2, and this one with 3"):
            roll_call.meet(job[0]._replace(num_processes=3, process_id=2), 20)
        roll_call.meet(job[1], 20)
        leader.result()


@pytest.mark.parametrize("host", [local_processes.HERE, local_processes.AS_IF_FAR])
def test_a_second_job_at_the_port(host: str):
    """As jax's service has it, which would share the port, and would be broken by another's process 1."""
    job = launches(2, host)
    with socket.create_server(("", job[0].port), reuse_port=True) as service:

        def serve() -> None:
            connection, _ = service.accept()
            with connection:
                connection.sendall(b"\x00\x00\x12\x04\x00")  # HTTP/2 settings

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(RuntimeError, match="is something else, perhaps another job; give this job another port"):
            roll_call.meet(job[1], 20)
        thread.join()
        with pytest.raises(RuntimeError, match="cannot be had: Address already in use, perhaps by another job"):
            roll_call.meet(job[0], 20)


@pytest.fixture
def given_to_jax(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What jax.distributed.initialize is called with, in a job whose processes have met."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(roll_call, "meet", lambda launch: given.update(met=launch))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: given.update(kwargs, args=args))
    monkeypatch.setattr(distributed, "_join", lambda *_: None)
    monkeypatch.setattr(distributed, "_groups", [])
    monkeypatch.setattr(jax.config, "update", lambda name, value: given.update({name: value}))
    monkeypatch.setenv("XLA_FLAGS", "--xla_before=1")
    return given


def test_jax_decides_nothing_of_its_own(given_to_jax: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    launch = Launch("localhost:1234", 4, 3, local_device_ids=(1,))
    monkeypatch.setattr(distributed, "find_launch", lambda *_: launch)
    distributed.initialize(heartbeat_timeout_s=7)
    assert given_to_jax == {
        "met": launch,
        "args": ("localhost:1234", 4, 3),
        "local_device_ids": (1,),
        "cluster_detection_method": "deactivate",
        "coordinator_bind_address": "127.0.0.1:1234",
        "initialization_timeout": 60,
        "heartbeat_timeout_seconds": 9,
        "jax_enable_preemption_service": False,
    }


def test_every_process_autotunes_by_itself(given_to_jax: dict[str, Any]):
    """Or those that find no compiled programs on disk wait for process 0, which did."""
    distributed.initialize("node0:1234", 2, 1)
    assert os.environ["XLA_FLAGS"].split() == ["--xla_before=1", "--xla_gpu_shard_autotuning=false"]
    assert given_to_jax["coordinator_bind_address"] is None


def test_a_process_that_waits_says_so(
    given_to_jax: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(distributed, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(roll_call, "meet", lambda launch: threading.Event().wait(0.5))
    distributed.initialize("node0:1234", 2, 1)
    assert capfd.readouterr().err == "process 1 of 2: waits for the others at node0:1234\n"
