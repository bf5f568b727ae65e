"""How the processes of a job connect: each shows process 0 the secret of the job, and is in once all are there.

    process 1, 2, ...  ---- HELLO: its index, the secret, its heartbeat limit --->  process 0
                       <--- HELLO once all have come, FATAL if that goes wrong ---

Until process 0 has answered, no process expects another's heartbeats: the last may come much later than the first.
"""

import contextlib
import hmac
import io
import selectors
import socket
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

from jaxinfer import frames
from jaxinfer.frames import Frame, Kind

_HELLO_TIMEOUT_S = 5.0  # for a connection to say who it is
_CONNECT_TIMEOUT_S = 60.0  # for all processes to be connected, once they know where
_HELLO_BYTES = 1024


def listen(*, only_here: bool) -> socket.socket:
    """A socket for followers to connect to, at a free port; `only_here` for those on this machine."""
    if only_here:
        return socket.create_server(("127.0.0.1", 0), backlog=128)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    return socket.create_server(("", 0), backlog=128)


def accept(
    server: socket.socket, count: int, secret: bytes, heartbeat_timeout_s: float, say: Callable[[str], None]
) -> dict[int, socket.socket]:
    """A connection to each of the processes 1 to `count` - 1, which know the secret. Closes `server`.

    Whoever does not is turned away, and `say` is told. Raises RuntimeError, here and in those that are connected,
    for who is missing after a minute and for who was given another heartbeat limit.
    """
    connections: dict[int, socket.socket] = {}
    limits: dict[int, Any] = {}
    with contextlib.closing(_arrivals(server, time.monotonic() + _CONNECT_TIMEOUT_S)) as arrivals:
        for arrival, said in arrivals:
            try:
                index, limit = _read_hello(said, count, secret)
                if index in connections:
                    raise ValueError(f"process {index} is connected already")
            except (ValueError, OSError) as error:
                arrival.connection.close()
                say(f"refused a connection from {arrival.host}: {error}")
                continue
            arrival.connection.settimeout(_HELLO_TIMEOUT_S)
            connections[index], limits[index] = arrival.connection, limit
            if len(connections) == count - 1:
                break
    if problem := _missing(connections, count) or _difference(limits, heartbeat_timeout_s):
        _send_to_all(connections.values(), frames.encode(Kind.FATAL, problem))
        for connection in connections.values():
            connection.close()
        raise RuntimeError(problem)
    _send_to_all(connections.values(), frames.encode(Kind.HELLO))
    return connections


def connect(hosts: list[str], port: int, index: int, secret: bytes, heartbeat_timeout_s: float) -> socket.socket:
    """To process 0, by the first of its names and addresses that answers, once all are there.

    Raises RuntimeError, which says why, if process 0 cannot be reached or does not let this process in.
    """
    problems: list[str] = []
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S / len(hosts))
        except OSError as error:
            problems.append(f"{host}: {error.strerror or error}")
            continue
        try:
            hello = {"process": index, "secret": secret.hex(), "heartbeat_timeout_s": heartbeat_timeout_s}
            connection.sendall(frames.encode(Kind.HELLO, hello))
            connection.settimeout(_CONNECT_TIMEOUT_S + _HELLO_TIMEOUT_S)  # process 0 may have begun to wait later
            answer = frames.read(frames.reader(connection))
            if answer.kind is not Kind.HELLO:
                raise ValueError(answer.value)
        except (OSError, ValueError) as error:
            connection.close()
            raise RuntimeError(f"process 0 did not let process {index} in: {error}") from None
        return connection
    raise RuntimeError(f"process 0 cannot be reached at port {port} of {'; '.join(problems)}")


class _Arrival:
    """A connection that has not said all of its hello."""

    def __init__(self, connection: socket.socket, host: str):
        connection.setblocking(False)
        self.connection = connection
        self.host = host
        self.deadline = time.monotonic() + _HELLO_TIMEOUT_S
        self._received = bytearray()

    def hello(self) -> Frame | Exception | None:
        """What it said, or why that cannot be read; None as long as more may come."""
        try:
            if not (data := self.connection.recv(_HELLO_BYTES)):
                return ConnectionError("its connection was closed")
            self._received += data
            return frames.read(self._from_start(), max_header_bytes=_HELLO_BYTES, max_array_bytes=0)
        except BlockingIOError:
            if time.monotonic() < self.deadline:
                return None
            return TimeoutError(f"it has not said who it is in {_HELLO_TIMEOUT_S:g} s")
        except (OSError, ValueError) as error:
            return error

    def _from_start(self) -> Callable[[int], bytes]:
        """What reads the bytes that have come; BlockingIOError where they end."""
        received = io.BytesIO(self._received)

        def read_exactly(num_bytes: int) -> bytes:
            if len(data := received.read(num_bytes)) < num_bytes:
                raise BlockingIOError
            return data

        return read_exactly


def _arrivals(server: socket.socket, deadline: float) -> Generator[tuple[_Arrival, Frame | Exception]]:
    """Who connects until the deadline, each as soon as it has said its hello: nobody waits for who is slow to."""
    waiting: list[_Arrival] = []
    with contextlib.ExitStack() as closing, selectors.DefaultSelector() as selector:
        closing.enter_context(server)
        closing.callback(lambda: [arrival.connection.close() for arrival in waiting])
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        while (now := time.monotonic()) < deadline:
            selector.select(min([deadline, *(arrival.deadline for arrival in waiting)]) - now)
            with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                connection, address = server.accept()
                selector.register(connection, selectors.EVENT_READ)
                waiting.append(_Arrival(connection, address[0]))
            for arrival in [*waiting]:
                if (said := arrival.hello()) is not None:
                    selector.unregister(arrival.connection)
                    waiting.remove(arrival)
                    yield arrival, said


def _read_hello(said: Frame | Exception, count: int, secret: bytes) -> tuple[int, Any]:
    """Who connected, and its heartbeat limit. Raises ValueError unless it knows the secret."""
    if isinstance(said, Exception):
        raise said
    value = said.value if isinstance(said.value, dict) else {}
    shown, known = str(value.get("secret")).encode(), secret.hex().encode()
    if said.kind is not Kind.HELLO or not hmac.compare_digest(shown, known):
        raise ValueError("it does not know the secret of this job")
    index = value.get("process")
    if type(index) is not int or not 0 < index < count:
        raise ValueError(f"it says that it is process {index!r:.20} of {count}")
    return index, value.get("heartbeat_timeout_s")


def _missing(connections: dict[int, socket.socket], count: int) -> str:
    missing = [str(index) for index in range(1, count) if index not in connections]
    limit = f"{_CONNECT_TIMEOUT_S:g} s"
    return f"processes {', '.join(missing)} of {count} have not connected in {limit}" if missing else ""


def _difference(limits: dict[int, Any], limit: float) -> str:
    """Who would take another's silence for its end, or be taken for silent."""
    for index, other in sorted(limits.items()):
        if other != limit:
            values = f"is {limit!r} in process 0 and {other!r} in process {index}"
            return f"--heartbeat_timeout_s {values}; give all processes the same"
    return ""


def _send_to_all(connections: Iterable[socket.socket], frame: bytes) -> None:
    """Who has gone meanwhile is noticed later."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(frame)
