"""Which process of a job this is, by flags or by what a cluster tells its processes. jax is asked nothing of it."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxinfer.kubernetes_job import find_pods

DEFAULT_HEARTBEAT_TIMEOUT_S = 20
MIN_HEARTBEAT_TIMEOUT_S = 2
LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}

_FIRST_PORT, _NUM_PORTS = 61440, 4096  # where a cluster's jobs have the port of process 0, each by its number
_STEPS_APART = 509  # of one SLURM job, so that they are not on the ports of the jobs after it
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class Launch(NamedTuple):
    """Which of how many processes this is, and where process 0 is.

    Attributes:
      coordinator_address: host:port of process 0.
      local_device_ids: the GPUs of its machine that are this process'; None for all that it sees.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None

    @property
    def host(self) -> str:
        return self.coordinator_address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator_address.rpartition(":")[2])

    @property
    def bind_address(self) -> str | None:
        """Where process 0 listens if all processes are on its machine; None for every address that it has."""
        ip = LOOPBACK.get(self.host)
        return f"{_bracketed(ip)}:{self.port}" if ip else None


def find_launch(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_timeout_s: int = DEFAULT_HEARTBEAT_TIMEOUT_S,
    env: Mapping[str, str] = os.environ,
) -> Launch | None:
    """What the flags of these names, or a cluster's variables in `env`, say; None for a process by itself.

    Flags say it whatever `env` has. Raises ValueError for flags that are wrong or contradict each other.
    """
    if heartbeat_timeout_s < MIN_HEARTBEAT_TIMEOUT_S:
        raise ValueError(f"--heartbeat_timeout_s={heartbeat_timeout_s}: must be at least {MIN_HEARTBEAT_TIMEOUT_S}")
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if all(value is None for value in given.values()):
        return _of_cluster(env)
    if missing := [name for name, value in given.items() if value is None]:
        there = [name for name, value in given.items() if value is not None]
        raise ValueError(f"{', '.join(there)} without {', '.join(missing)}; give all three, or none in a cluster")
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    _check_address("--coordinator_address", coordinator_address)
    if num_processes < 1:
        raise ValueError(f"--num_processes={num_processes}: must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id}: must be from 0 to {num_processes - 1}, for --num_processes={num_processes}"
        )
    return Launch(coordinator_address, num_processes, process_id) if num_processes > 1 else None


def _of_cluster(env: Mapping[str, str]) -> Launch | None:
    """What Open MPI, SLURM or Kubernetes says, where it started more than this process.

    Open MPI first, for what `mpirun` starts within a SLURM job has variables of both.
    """
    if (count := int(env.get("OMPI_COMM_WORLD_SIZE", "1"))) > 1:
        return _of_open_mpi(env, count)
    if all(name in env for name in _SLURM):
        # Of the step, where it says so: in an allocation's own shell SLURM_NTASKS is of what could be started.
        count = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
        return _of_slurm(env, count) if count > 1 else None
    pods = find_pods(env)
    return Launch(_address(env, pods.first_host, 0), pods.num_pods, pods.own_index) if pods else None


def _of_open_mpi(env: Mapping[str, str], count: int) -> Launch:
    """Process 0 is where `mpirun` is, whose address Open MPI 4 tells in 1531576320.0;tcp://10.96.0.1,10.97.0.1:34911"""
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.match(r"(?P<job>\d+)\.\d+;tcp(?:://(?P<ipv4>[^,:]+)|6://\[(?P<ipv6>[^,\]]+))", uri)
    if match is None:
        raise ValueError(
            f"Open MPI started {count} processes and does not say where process 0 is, as version 5; give "
            f"--coordinator_address=HOST:PORT --num_processes={count} --process_id=$OMPI_COMM_WORLD_RANK"
        )
    is_alone = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return Launch(
        # Each mpirun has a number, and its job's number is 2**16 times that.
        coordinator_address=_address(env, match["ipv4"] or match["ipv6"], int(match["job"]) >> 16),
        num_processes=count,
        process_id=int(env["OMPI_COMM_WORLD_RANK"]),
        local_device_ids=None if is_alone else _own_device(env, int(env["OMPI_COMM_WORLD_LOCAL_RANK"])),
    )


def _of_slurm(env: Mapping[str, str], count: int) -> Launch:
    """Process 0 is on the first machine of the step's, as in node[007-009,012],other"""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", env["SLURM_STEP_NODELIST"])
    assert match is not None
    step = int(env.get("SLURM_STEP_ID", "0"))
    per_machine = env.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")  # as 1(x2), or 2(x3),1
    is_alone = all(num_tasks.partition("(")[0] == "1" for num_tasks in per_machine)
    has_own = "SLURM_GPUS_PER_TASK" in env  # and sees no other
    return Launch(
        coordinator_address=_address(env, match[1] + (match[2] or ""), int(env["SLURM_JOB_ID"]) + _STEPS_APART * step),
        num_processes=count,
        process_id=int(env["SLURM_PROCID"]),
        local_device_ids=None if is_alone or has_own else _own_device(env, int(env["SLURM_LOCALID"])),
    )


def _address(env: Mapping[str, str], host: str, number: int) -> str:
    """Of process 0 in the job of this number; what a user sets for jax counts."""
    port = env.get("JAX_COORDINATOR_PORT", str(_FIRST_PORT + number % _NUM_PORTS))
    address = env.get("JAX_COORDINATOR_ADDRESS", f"{_bracketed(host)}:{port}")
    _check_address("JAX_COORDINATOR_ADDRESS", address)
    return address


def _check_address(name: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"{name}={address}: must be host:port of process 0, as node0:12345")


def _own_device(env: Mapping[str, str], local_index: int) -> tuple[int, ...] | None:
    """The GPU of one of several processes on a machine; None where it sees only its own."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    is_bound = visible is not None and len(visible.split(",")) <= local_index
    return None if is_bound or "JAX_LOCAL_DEVICE_IDS" in env else (local_index,)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
