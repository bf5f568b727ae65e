"""The processes that run one engine, joined by TCP: process 0 leads, every other follows it.

    process 0  ----- announcements, heartbeats ---->  process 1, 2, ...
               <----- answers, heartbeats ----------

These connections carry what the host decides; devices have collectives of their own. A thread per connection
listens, so that the end of a process ends all others, whatever their main threads wait for: nobody can go on without
it, and a collective that waits for it never returns.
"""

import atexit
import contextlib
import os
import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jaxinfer import frames
from jaxinfer.frames import Frame, Kind

_FAREWELL_S = 1.0  # for the others to be told why all ends
_HEARTBEATS_PER_TIMEOUT = 4
_WHY_CHARS = 1000  # of a reason; in a line it is less than a pipe takes at once


class ProcessGroup:
    """This process and its connections. `index` 0 leads and has one to each other process; those have one to it.

    Attributes:
      index, count: of this process, and of all.
      timeout_s: how long a process may be silent.
    """

    def __init__(self, index: int, count: int, connections: Mapping[int, socket.socket], heartbeat_timeout_s: float):
        self.index = index
        self.count = count
        self.timeout_s = heartbeat_timeout_s
        self._connections = dict(connections)
        self._inbox: dict[int, queue.SimpleQueue[Frame]] = {peer: queue.SimpleQueue() for peer in connections}
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._ending = threading.Lock()
        self._needs_others = True
        self._lost = ""  # who has left, and how
        for connection in self._connections.values():
            connection.settimeout(heartbeat_timeout_s)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._sender.start()
        for peer, connection in self._connections.items():  # last, for what is heard may end this process at once
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True).start()
        atexit.register(self._leave)

    @property
    def leads(self) -> bool:
        return self.index == 0

    @property
    def name(self) -> str:
        return _name(self.index, self.count)

    def announce(self, frame: bytes) -> None:
        """Sends a frame to every process that this one is connected to, without waiting. All of them, or none."""
        self._outbox.put(frame)

    def next_announcement(self) -> Frame:
        """Of process 0, waiting for it."""
        return self._inbox[0].get()

    def all_gather(self, topic: str, value: Any, timeout_s: float | None = None) -> list[Any]:
        """Every process' JSON `value` in their order, once all have called this. Ends the job where topics differ.

        It also ends if `timeout_s` pass, though all processes are alive.
        """
        self._needs_others = True
        if self._lost:  # while this process needed nobody
            self.die(self._lost)
        if self.leads:
            of_others = [self._answer(peer, topic, timeout_s) for peer in sorted(self._connections)]
            values = [value, *of_others]
            self.announce(frames.encode(Kind.GATHER, [topic, values]))
            return values
        self.announce(frames.encode(Kind.GATHER, [topic, value]))
        return self._answer(0, topic, timeout_s)

    def close(self) -> None:
        """Tells the others that this is the end of the work: until processes gather again, they may leave."""
        self._needs_others = False
        self.announce(frames.encode(Kind.CLOSE))

    def abort(self, why: str, exit_code: int = 1) -> None:
        """Ends this process at once and tells the others why, unless its work is done: then it does nothing."""
        if self._needs_others:
            self._end(why, exit_code, lambda: sys.stdout.flush())

    def die(self, why: str, *, unless_told_s: float = 0.0) -> NoReturn:
        """Says why the job ends, here and in the other processes, and ends this one. From any thread.

        `unless_told_s`: so long another thread may say a better reason, for the end of a process lets much else fail.
        """
        time.sleep(unless_told_s)
        self._end(why, 1, lambda: _write_to_stderr(f"{self.name}: {why[:_WHY_CHARS]}; the job ends\n"))

    def _end(self, why: str, exit_code: int, say: Callable[[], object]) -> NoReturn:
        """Whatever fails here, this process ends; and the others are told though nobody reads what it says."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it
        try:
            self.announce(frames.encode(Kind.FATAL, why[:_WHY_CHARS]))
            with contextlib.suppress(Exception):  # a full disk, a reader that has gone, no file at all
                say()
            self._flush()
        finally:
            os._exit(exit_code)

    def _answer(self, peer: int, topic: str, timeout_s: float | None) -> Any:
        try:
            frame = self._inbox[peer].get(timeout=timeout_s)
        except queue.Empty:
            self.die(f'{_name(peer, self.count)} has not answered "{topic}" for {timeout_s:g} s')
        if frame.kind is not Kind.GATHER or frame.value[0] != topic:
            at = f'at "{frame.value[0]}"' if frame.kind is Kind.GATHER else f"not, but sends {frame.kind.name}"
            self.die(f'{self.name} is at "{topic}" and {_name(peer, self.count)} is {at}')
        return frame.value[1]

    def _listen(self, peer: int, connection: socket.socket) -> None:
        try:
            while True:
                frame = frames.read(frames.reader(connection))
                if frame.kind is Kind.FATAL:
                    self.die(str(frame.value))
                if frame.kind is Kind.CLOSE:
                    self._needs_others = False  # now, for the connection may end before anyone looks into the inbox
                if frame.kind is not Kind.HEARTBEAT:
                    self._inbox[peer].put(frame)
        except TimeoutError:
            why = f"has been silent for {self.timeout_s:g} s"
        except OSError as error:
            why = f"is gone: {error.strerror or error}"
        except ValueError as error:
            why = f"sent what cannot be read: {error}"
        self._lost = f"{_name(peer, self.count)} {why}"
        if self._needs_others:
            self.die(self._lost)

    def _send_all(self) -> None:
        """Writes what is announced, and heartbeats while nothing is. Who cannot be reached is `_listen`'s to notice."""
        heartbeat = frames.encode(Kind.HEARTBEAT)
        while True:
            try:
                frame = self._outbox.get(timeout=self.timeout_s / _HEARTBEATS_PER_TIMEOUT)
            except queue.Empty:
                frame = heartbeat
            if frame is None:
                return
            for connection in self._connections.values():
                with contextlib.suppress(OSError):
                    connection.sendall(frame)

    def _flush(self) -> None:
        self._outbox.put(None)
        if threading.current_thread() is not self._sender:
            self._sender.join(_FAREWELL_S)

    def _leave(self) -> None:
        """At the end of the interpreter, before jax waits for the other processes to end as well."""
        if self.leads and self._needs_others:
            self.close()
        self._needs_others = False
        self._flush()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _name(index: int, count: int) -> str:
    return f"process {index} of {count}"


def _write_to_stderr(text: str) -> None:
    """Not by way of sys.stderr, whose lock the main thread may hold; nothing if its reader has stalled."""
    if select.select([], [2], [], _FAREWELL_S)[1]:
        os.write(2, text.encode(errors="backslashreplace"))
