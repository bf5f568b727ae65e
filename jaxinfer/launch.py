"""Which process of a job this is, by flags or by what a cluster tells its processes."""

import importlib.util
import os
from collections.abc import Mapping
from typing import NamedTuple

DEFAULT_HEARTBEAT_TIMEOUT_S = 20
MIN_HEARTBEAT_TIMEOUT_S = 2


class Launch(NamedTuple):
    """Which of how many processes this is, and where process 0 is; None for what jax asks the cluster."""

    coordinator_address: str | None = None  # host:port
    num_processes: int | None = None
    process_id: int | None = None


def find_launch(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_timeout_s: int = DEFAULT_HEARTBEAT_TIMEOUT_S,
    env: Mapping[str, str] = os.environ,
) -> Launch | None:
    """What the flags of these names, or a cluster's variables in `env`, say; None for a process by itself.

    Raises ValueError for flags that are wrong or contradict each other.
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
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator_address={coordinator_address}: must be host:port of process 0, as node0:12345")
    if num_processes < 1:
        raise ValueError(f"--num_processes={num_processes}: must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id}: must be from 0 to {num_processes - 1}, for --num_processes={num_processes}"
        )
    return Launch(coordinator_address, num_processes, process_id) if num_processes > 1 else None


def _of_cluster(env: Mapping[str, str]) -> Launch | None:
    """SLURM, Open MPI and Kubernetes as jax knows them, and only where they started more than this process."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in slurm):
        # Of the step, where it says so: in an allocation's own shell SLURM_NTASKS is of what could be started.
        count = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
        return Launch(None, count, int(env["SLURM_PROCID"])) if count > 1 else None
    if (count := int(env.get("OMPI_COMM_WORLD_SIZE", "1"))) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in env:  # by which jax finds process 0; Open MPI 5 has it no more
            raise ValueError(
                f"Open MPI started {count} processes and does not say where process 0 is; give "
                f"--coordinator_address=HOST:PORT --num_processes={count} --process_id=$OMPI_COMM_WORLD_RANK"
            )
        return Launch(None, count, int(env["OMPI_COMM_WORLD_RANK"]))
    is_indexed_job = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    if is_indexed_job and importlib.util.find_spec("kubernetes") is not None:  # which is how jax asks
        return Launch()
    return None


def uses_all_devices(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a cluster started one process on each machine, which jax would give a single device none the less."""
    per_host = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("OMPI_COMM_WORLD_LOCAL_SIZE")  # as 1(x2), or 2(x3),1
    if per_host is None or "JAX_LOCAL_DEVICE_IDS" in env:
        return False
    return all(count.partition("(")[0] == "1" for count in per_host.split(","))
