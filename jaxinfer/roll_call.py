"""How the processes of a job meet, before jax joins them: process 0 calls the roll at the port that jax takes next.

    process 1, 2, ...  ---- jaxinfer 1/3 ---->  process 0
                       <---- go, or why not ---

jax's service at that port shares it with that of another job, is broken by a process of another job that comes to it,
and ends with a stack trace, which names nobody, when one of its own does not come.
"""

import contextlib
import os
import re
import selectors
import socket
import time
from typing import cast

from jaxinfer.launch import Launch

_TIMEOUT_S = 300.0  # for all processes to be there
_RETRY_S = 0.2
_GO = b"go\n"
_LINE_BYTES = 200


def meet(launch: Launch, timeout_s: float = _TIMEOUT_S) -> None:
    """Returns in all processes of the job once all are there; the port is free then.

    Raises RuntimeError if some do not come, if the port is taken, or if another job is there.
    """
    if launch.process_id == 0:
        _call(launch, time.monotonic() + timeout_s)
    else:
        _answer(launch, time.monotonic() + timeout_s)


def _call(launch: Launch, deadline: float) -> None:
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as connections:
        with _server(launch) as server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while len(present) < launch.num_processes - 1:
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events or time.monotonic() > deadline:
                    raise RuntimeError(_missing(launch, present))
                for key, _ in events:
                    if key.fileobj is server:
                        connection = connections.enter_context(server.accept()[0])
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ)
                    elif not _is_in(connection := cast(socket.socket, key.fileobj), launch, present):
                        selector.unregister(connection)
                        connection.close()
        for connection in present.values():
            connection.sendall(_GO)


def _is_in(connection: socket.socket, launch: Launch, present: dict[int, socket.socket]) -> bool:
    """Puts who speaks among those that are `present`; False for one that leaves, or has no business here."""
    try:
        line = connection.recv(_LINE_BYTES)
    except OSError:
        line = b""
    for index in [index for index, one in present.items() if one is connection]:
        del present[index]  # it ended, or says more than it should
        return False
    match = re.fullmatch(rb"jaxinfer (\d{1,9})/(\d{1,9})\n", line)
    if match is None:
        return False
    index, count = int(match[1]), int(match[2])
    if count != launch.num_processes:
        why = f"process 0 was started with --num_processes={launch.num_processes}, and this one with {count}"
    elif index in present or index == 0:
        why = f"another process {index} is there; another job may run there, so give this one another port"
    else:
        present[index] = connection
        return True
    with contextlib.suppress(OSError):
        connection.sendall(why.encode() + b"\n")
    return False


def _answer(launch: Launch, deadline: float) -> None:
    there = f"{launch.coordinator_address}, where process 0 should be,"
    try:
        with _connected(launch, deadline) as connection:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.sendall(f"jaxinfer {launch.process_id}/{launch.num_processes}\n".encode())
            line = connection.recv(_LINE_BYTES)
    except TimeoutError:
        raise RuntimeError(f"{there} still waits for other processes, or cannot be reached") from None
    except OSError as error:
        raise RuntimeError(f"{there} cannot be reached: {error.strerror or error}") from None
    if line == _GO:
        return
    if not line:
        raise RuntimeError(f"process 0 at {launch.coordinator_address} has ended")
    if not line.endswith(b"\n") or not line[:-1].isascii():
        raise RuntimeError(f"{there} is something else, perhaps another job; give this job another port")
    raise RuntimeError(f"{launch.coordinator_address}: {line.decode().strip()}")


def _server(launch: Launch) -> socket.socket:
    ip = launch.bind_address.rpartition(":")[0].strip("[]") if launch.bind_address else ""
    is_dual = not ip and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual or ":" in ip else socket.AF_INET
    try:
        return socket.create_server((ip, launch.port), family=family, dualstack_ipv6=is_dual, backlog=128)
    except OSError as error:
        raise RuntimeError(
            f"port {launch.port} cannot be had: {os.strerror(error.errno or 0)}, perhaps by another job; choose "
            f"another by --coordinator_address, or in a cluster by JAX_COORDINATOR_PORT"
        ) from None


def _connected(launch: Launch, deadline: float) -> socket.socket:
    """To process 0, which may not have been started yet, or not be known by name."""
    while True:
        try:
            return socket.create_connection((launch.host, launch.port), timeout=max(0.001, deadline - time.monotonic()))
        except OSError:
            if time.monotonic() + _RETRY_S > deadline:
                raise
        time.sleep(_RETRY_S)


def _missing(launch: Launch, present: dict[int, socket.socket]) -> str:
    missing = [str(index) for index in range(1, launch.num_processes) if index not in present]
    names = f"process{'es' if len(missing) > 1 else ''} {', '.join(missing)} of {launch.num_processes}"
    return f"{names} did not come to {launch.coordinator_address}; start them all"
