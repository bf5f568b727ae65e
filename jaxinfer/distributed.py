"""Several processes, on one machine or many, that run one engine: how they start and find each other.

Every process runs the same program. Process 0 decides what to run and does all input and output; the others follow it.
"""

import contextlib
import json
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinfer import rendezvous, roll_call
from jaxinfer.devices import add_xla_flag
from jaxinfer.launch import DEFAULT_HEARTBEAT_TIMEOUT_S, LOOPBACK, find_launch
from jaxinfer.process_group import ProcessGroup

_OFFER_BYTES = 1024  # of what process 0 tells the others at the start
# jax ends a process that misses another; a little later than we do, who have more to say about it.
_JAX_HEARTBEAT_EXTRA_S = 2
_JAX_TIMEOUT_S = 60  # for its processes to connect, all of which are there
_PATIENCE_S = 5.0  # before a process says that it waits
# jax keeps compiled programs in process 0 only, which would have no part in sharing out what others still compile.
_EACH_AUTOTUNES = "--xla_gpu_shard_autotuning=false"

_groups: list[ProcessGroup] = []  # of this process: one at most, for its whole life


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_s: int = DEFAULT_HEARTBEAT_TIMEOUT_S,
) -> ProcessGroup | None:
    """Joins the other processes of the job; None for a process by itself. Call before jax uses a device.

    `coordinator_address` is host:port of process 0. Without arguments a cluster (SLURM, Open MPI 4, Kubernetes) is
    asked. Returns when all processes are there; from then on the end of one, or its silence for `heartbeat_timeout_s`
    seconds, which must be the same in all, ends all. Raises ValueError for arguments that contradict each other,
    RuntimeError for processes that have not come after five minutes, and for a port that another job has.
    """
    launch = find_launch(coordinator_address, num_processes, process_id, heartbeat_timeout_s)
    if launch is None:
        return None
    name = f"process {launch.process_id} of {launch.num_processes}"
    with _said_if_long(f"{name}: waits for the others at {launch.coordinator_address}"):
        roll_call.meet(launch)
    jax.config.update("jax_enable_preemption_service", False)  # it catches SIGTERM, which must end a process
    add_xla_flag(_EACH_AUTOTUNES)
    jax.distributed.initialize(
        launch.coordinator_address,
        launch.num_processes,
        launch.process_id,
        local_device_ids=launch.local_device_ids,
        cluster_detection_method="deactivate",  # or what it finds takes all but one device of each process
        initialization_timeout=_JAX_TIMEOUT_S,
        coordinator_bind_address=launch.bind_address,
        heartbeat_timeout_seconds=heartbeat_timeout_s + _JAX_HEARTBEAT_EXTRA_S,
    )
    _groups.append(_join(launch.coordinator_address, heartbeat_timeout_s))
    return _groups[0]


def joined_group() -> ProcessGroup | None:
    """That of `initialize`, if it was called and found other processes."""
    return _groups[0] if _groups else None


def process_group() -> ProcessGroup | None:
    """This process' own: that of `initialize`, or a new one where only jax.distributed.initialize was called.

    None for a process by itself.
    """
    if not _groups and jax.process_count() > 1:
        _groups.append(_join(None, DEFAULT_HEARTBEAT_TIMEOUT_S))
    return _groups[0] if _groups else None


def _join(coordinator_address: str | None, heartbeat_timeout_s: int) -> ProcessGroup:
    """Connects the processes. Where to, and the secret that they show there, comes through jax, once."""
    index, count = jax.process_index(), jax.process_count()
    if index > 0:
        offer = _broadcast({})
        secret = bytes.fromhex(offer["secret"])
        leader = rendezvous.connect(offer["hosts"], offer["port"], index, secret, heartbeat_timeout_s)
        return ProcessGroup(index, count, {0: leader}, heartbeat_timeout_s)
    host = coordinator_address.rpartition(":")[0].strip("[]") if coordinator_address else ""
    is_local, secret = host in LOOPBACK, secrets.token_bytes(32)
    server = rendezvous.listen(only_here=is_local)
    hosts = ["127.0.0.1"] if is_local else _own_names(host)
    _broadcast({"hosts": hosts, "port": server.getsockname()[1], "secret": secret.hex()})
    followers = rendezvous.accept(server, count, secret, heartbeat_timeout_s, _say)
    return ProcessGroup(0, count, followers, heartbeat_timeout_s)


def _broadcast(offer: dict[str, Any]) -> dict[str, Any]:
    """Process 0's, in every process."""
    text = json.dumps(offer).encode()
    assert len(text) <= _OFFER_BYTES
    padded = np.frombuffer(text.ljust(_OFFER_BYTES), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def _own_names(host: str) -> list[str]:
    """By which other machines may reach this one, likeliest first."""
    names = [host, socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it asks for the address of the route out
        names.append(probe.getsockname()[0])
    return [name for name in dict.fromkeys(names) if name]


@contextlib.contextmanager
def _said_if_long(text: str) -> Iterator[None]:
    timer = threading.Timer(_PATIENCE_S, _say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
