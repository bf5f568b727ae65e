"""How the processes of a job connect: each shows process 0 the secret of the job, and is in."""

import hmac
import socket
import time
from collections.abc import Callable

from jaxinfer import frames
from jaxinfer.frames import Kind

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


def accept(server: socket.socket, count: int, secret: bytes, say: Callable[[str], None]) -> dict[int, socket.socket]:
    """A connection to each of the processes 1 to `count` - 1, which know the secret. Closes `server`.

    Whoever does not is turned away, and `say` is told. Raises RuntimeError for who is missing after a minute.
    """
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _CONNECT_TIMEOUT_S
    with server:
        while len(connections) < count - 1:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, address = server.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, count) if i not in connections]
                limit = f"{_CONNECT_TIMEOUT_S:g} s"
                raise RuntimeError(f"processes {', '.join(missing)} of {count} have not connected in {limit}") from None
            try:
                index = _read_hello(connection, count, secret)
                if index in connections:
                    raise ValueError(f"process {index} is connected already")
            except (ValueError, OSError) as error:
                connection.close()
                say(f"refused a connection from {address[0]}: {error}")
                continue
            connections[index] = connection
    return connections


def connect(hosts: list[str], port: int, index: int, secret: bytes) -> socket.socket:
    """To process 0, by the first of its names and addresses that answers."""
    problems: list[str] = []
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S / len(hosts))
        except OSError as error:
            problems.append(f"{host}: {error.strerror or error}")
            continue
        connection.sendall(frames.encode(Kind.HELLO, {"process": index, "secret": secret.hex()}))
        return connection
    raise RuntimeError(f"process 0 cannot be reached at port {port} of {'; '.join(problems)}")


def _read_hello(connection: socket.socket, count: int, secret: bytes) -> int:
    """Who connected. Raises ValueError unless it knows the secret."""
    connection.settimeout(_HELLO_TIMEOUT_S)
    hello = frames.read(frames.reader(connection), max_header_bytes=_HELLO_BYTES, max_array_bytes=0)
    value = hello.value if isinstance(hello.value, dict) else {}
    shown, known = str(value.get("secret")).encode(), secret.hex().encode()
    if hello.kind is not Kind.HELLO or not hmac.compare_digest(shown, known):
        raise ValueError("it does not know the secret of this job")
    index = value.get("process")
    if type(index) is not int or not 0 < index < count:
        raise ValueError(f"it says that it is process {index!r:.20} of {count}")
    return index
