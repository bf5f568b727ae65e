"""A process of a group that has no devices, and does what a test wants to see the end of.

python -m tests.process_group_worker PORT COUNT INDEX TIMEOUT_S DEED
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import types

from jaxinfer import frames, rendezvous
from jaxinfer.process_group import ProcessGroup

SECRET = b"of a test"
LATE_S = 3.0


def join(port: int, count: int, index: int, timeout_s: float) -> ProcessGroup:
    if index == 0:
        server = socket.create_server(("127.0.0.1", port))
        return ProcessGroup(0, count, rendezvous.accept(server, count, SECRET, timeout_s, print), timeout_s)
    while True:  # process 0 may be slower to start
        try:
            leader = rendezvous.connect(["127.0.0.1"], port, index, SECRET, timeout_s)
            return ProcessGroup(index, count, {0: leader}, timeout_s)
        except RuntimeError:
            time.sleep(0.02)


def do(group: ProcessGroup, deed: str) -> None:
    print(group.all_gather("start", group.index), flush=True)
    time.sleep(0.3)  # what was gathered leaves this process
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif deed.startswith("leave"):
        time.sleep(3 if deed == "leave after 3 s" else 0)
        return
    elif deed == "die, and nobody can be told":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        threading.Thread(target=group.die, args=("the model is broken",)).start()
    elif deed == "die, and nobody listens":
        _, writing_end = os.pipe()  # whose other end stays open
        os.set_blocking(writing_end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing_end, bytes(4096))
        os.set_blocking(writing_end, True)
        os.dup2(writing_end, 2)
        threading.Thread(target=group.die, args=("the model is broken",)).start()
    elif deed == "abort, without stdout":
        sys.stdout = None
        group.abort("the model is broken", exit_code=3)
    elif deed == "abort, interrupted":
        sys.stdout = types.SimpleNamespace(flush=lambda: signal.raise_signal(signal.SIGINT))
        group.abort("the model is broken", exit_code=3)
    elif deed == "abort":
        group.abort("the model is broken", exit_code=3)
    elif deed == "garble":
        group.announce(b"GET / HTTP/1.1\r\nHost: example.org\r\n")
    elif deed.startswith("gather"):
        group.all_gather(deed, None)
    elif deed == "no answer":
        group.all_gather("answer", None, timeout_s=0.2)
    elif deed == "close":
        group.close()
        return
    elif deed == "close, gather":
        group.close()
        time.sleep(1)
        group.all_gather("again", None)
    elif deed.endswith("follow"):
        assert group.next_announcement().kind is frames.Kind.CLOSE
        return
    time.sleep(60)  # with the interpreter's lock released, as in a collective


if __name__ == "__main__":
    port, count, index, timeout_s, deed = sys.argv[1:]
    time.sleep(LATE_S if deed.startswith("come late") else 0)
    do(join(int(port), int(count), int(index), float(timeout_s)), deed)
