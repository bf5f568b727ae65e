"""Which process of a job this is: from flags, from a cluster, or by itself; and what contradicts itself is refused."""

import importlib.machinery
import pathlib
import sys
import types
from typing import Any

import pytest

from jaxinfer.launch import Launch, find_launch
from tests import command_line

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
OF_SLURM = Launch("node01:61441", 2, 1)
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
OF_OPEN_MPI = Launch("10.96.0.1:64330", 4, 3, (1,))
OPEN_MPI_5 = {key: value for key, value in OPEN_MPI.items() if key != "OMPI_MCA_orte_hnp_uri"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


def test_flags_say_it():
    assert find_launch("node0:12345", 2, 1, env=SLURM) == Launch("node0:12345", 2, 1)
    assert find_launch("[::1]:12345", 2, 0, env={}) == Launch("[::1]:12345", 2, 0)
    assert find_launch("node0:12345", 1, 0, env={}) is None


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            ("node0:1", None, None),
            "--coordinator_address without --num_processes, --process_id; give all three, or none",
        ),
        ((None, 2, 0), "--num_processes, --process_id without --coordinator_address; give all three"),
        (("node0", 2, 0), "--coordinator_address=node0: must be host:port of process 0, as node0:12345"),
        ((":123", 2, 0), "--coordinator_address=:123: must be host:port"),
        (("node0:70000", 2, 0), "--coordinator_address=node0:70000: must be host:port"),
        (("node0:²", 2, 0), "--coordinator_address=node0:²: must be host:port"),
        (("node0:1", 0, 0), "--num_processes=0: must be at least 1"),
        (("node0:1", 2, 2), "--process_id=2: must be from 0 to 1, for --num_processes=2"),
        (("node0:1", 2, -1), "--process_id=-1: must be from 0 to 1"),
        (("node0:1", 2, 1, 1), "--heartbeat_timeout_s=1: must be at least 2"),
    ],
)
def test_flags_that_contradict_themselves_are_refused(flags: tuple, problem: str):
    with pytest.raises(ValueError, match=problem.replace("[", r"\[")):
        find_launch(*flags, env={})


def test_the_command_refuses_them_in_a_line_before_anything_starts(capfd: pytest.CaptureFixture[str]):
    assert command_line.run_here("--prompt=a", "--num_processes=2") == 1
    assert capfd.readouterr().err == (
        "run_inference: error: --num_processes without --coordinator_address, --process_id; give all three, or none in "
        "a cluster\n"
    )


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (SLURM, OF_SLURM),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, OF_SLURM),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # the shell of an allocation
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"}, None),  # a batch script itself
        (OPEN_MPI, OF_OPEN_MPI),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SLURM | OPEN_MPI, OF_OPEN_MPI),  # mpirun in a SLURM job
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"} | OPEN_MPI, OF_OPEN_MPI),  # and in the shell of an allocation
        (KUBERNETES, None),  # without its package
    ],
)
def test_a_cluster_says_it(env: dict[str, str], expected: Launch | None):
    assert find_launch(None, None, None, env=env) == expected


@pytest.mark.parametrize(
    ("env", "address"),
    [
        (SLURM | {"SLURM_STEP_NODELIST": "gpu7"}, "gpu7:61441"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu7,cpu[1-2]"}, "gpu7:61441"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[007,009-12],cpu1"}, "gpu007:61441"),
        (SLURM | {"SLURM_JOB_ID": "4097"}, "node01:61441"),
        (SLURM | {"SLURM_STEP_ID": "1"}, "node01:61950"),  # not that of the step before
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "65536.0;tcp6://[fe80::b9b,2620:10d::2]:43370"}, "[fe80::b9b]:61441"),
        (SLURM | {"JAX_COORDINATOR_PORT": "4000"}, "node01:4000"),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:4000"}, "10.0.0.9:4000"),
    ],
)
def test_where_process_0_of_a_cluster_is(env: dict[str, str], address: str):
    launch = find_launch(None, None, None, env=env)
    assert launch is not None
    assert launch.coordinator_address == address


def test_an_address_from_the_environment_is_checked():
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS=node0: must be host:port"):
        find_launch(None, None, None, env=SLURM | {"JAX_COORDINATOR_ADDRESS": "node0"})


def test_an_open_mpi_that_does_not_say_where_process_0_is():
    with pytest.raises(ValueError, match="Open MPI started 4 processes and does not say where process 0 is, as versio"):
        find_launch(None, None, None, env=OPEN_MPI_5)
    assert find_launch("node0:1234", 4, 3, env=OPEN_MPI_5) == Launch("node0:1234", 4, 3)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, (3,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "11(x2)"}, (3,)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (3,)),  # all of the machine
        ({"CUDA_VISIBLE_DEVICES": "3"}, None),  # srun --gpus-per-task=1, or --gpu-bind
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "4"}, None),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),  # which jax reads itself
        (OPEN_MPI, (1,)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None),
        (OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "1"}, None),
    ],
)
def test_the_gpus_of_a_process(env: dict[str, str], expected: tuple[int, ...] | None):
    """All that it sees; but one by one those that several processes of a machine see."""
    four_each = {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": "3"}
    launch = find_launch(None, None, None, env=SLURM | four_each | env)
    assert launch is not None
    assert launch.local_device_ids == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost:80", ("localhost", 80, "127.0.0.1:80")),
        ("[::1]:80", ("::1", 80, "[::1]:80")),
        ("node0:80", ("node0", 80, None)),
    ],
)
def test_a_job_on_one_machine_is_not_reachable_from_others(address: str, expected: tuple[str, int, str | None]):
    launch = Launch(address, 2, 0)
    assert (launch.host, launch.port, launch.bind_address) == expected


def kubernetes(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, **spec: Any) -> None:
    """Its package, for a job of this specification, or which refuses to tell."""

    class ApiException(Exception):
        status, reason = 403, "Forbidden"

    def read_namespaced_job(name: str, namespace: str) -> types.SimpleNamespace:
        assert (name, namespace) == ("story-2", "lab")
        if not spec:
            raise ApiException
        return types.SimpleNamespace(spec=types.SimpleNamespace(**spec))

    batch = types.SimpleNamespace(read_namespaced_job=read_namespaced_job)
    client = types.SimpleNamespace(
        BatchV1Api=lambda: batch, exceptions=types.SimpleNamespace(ApiException=ApiException)
    )
    package = types.ModuleType("kubernetes")
    package.__spec__ = importlib.machinery.ModuleSpec("kubernetes", None)
    vars(package).update(client=client, config=types.SimpleNamespace(load_incluster_config=lambda: None))
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    (tmp_path / "namespace").write_text("lab\n")
    monkeypatch.setattr("jaxinfer.kubernetes_job._NAMESPACE", tmp_path / "namespace")


POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2", "HOSTNAME": "story-2-2"}


@pytest.mark.parametrize(
    ("subdomain", "completions", "parallelism", "expected"),
    [
        ("pods", 4, 4, Launch("story-2-0.pods:61440", 4, 2)),
        ("pods", 10, 4, None),  # a queue of work, of which four are at it
        ("pods", None, 4, None),
        ("pods", 1, 1, None),
        (None, 4, 4, None),  # they do not find each other
    ],
)
def test_the_pods_of_a_job(
    subdomain: str | None,
    completions: int | None,
    parallelism: int,
    expected: Launch | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
):
    template = types.SimpleNamespace(spec=types.SimpleNamespace(subdomain=subdomain))
    kubernetes(monkeypatch, tmp_path, template=template, completions=completions, parallelism=parallelism)
    assert find_launch(None, None, None, env=POD) == expected


def test_a_job_that_must_not_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    kubernetes(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="does not let this pod read its job story-2: 403 Forbidden; let its service"):
        find_launch(None, None, None, env=POD)
    assert find_launch("node0:1234", 1, 0, env=POD) is None

    def load_incluster_config() -> None:
        raise LookupError("Service token file does not exist.")  # where the account's is not mounted

    monkeypatch.setattr(sys.modules["kubernetes"].config, "load_incluster_config", load_incluster_config)
    with pytest.raises(ValueError, match=r"read its job story-2: Service token file does not exist\.; let its service"):
        find_launch(None, None, None, env=POD)
