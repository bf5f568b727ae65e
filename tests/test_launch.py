"""Which process of a job this is: from flags, from a cluster, or by itself; and what contradicts itself is refused."""

import pytest

from jaxinfer import launch
from jaxinfer.launch import Launch, find_launch
from tests import command_line

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


def of_cluster(env: dict[str, str]) -> Launch | None:
    return find_launch(None, None, None, env=env)


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
        (SLURM, Launch(None, 2, 1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, Launch(None, 2, 1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # the shell of an allocation
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"}, None),  # a batch script itself
        (OPEN_MPI, Launch(None, 4, 3)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (KUBERNETES, None),  # without the package by which jax asks there
    ],
)
def test_a_cluster_says_it(env: dict[str, str], expected: Launch | None):
    assert of_cluster(env) == expected


def test_kubernetes_is_asked_by_jax(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name == "kubernetes")
    assert of_cluster(KUBERNETES) == Launch(None, None, None)
    assert of_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # any other pod


def test_an_open_mpi_that_does_not_say_where_process_0_is():
    env = {key: value for key, value in OPEN_MPI.items() if key != "OMPI_MCA_orte_hnp_uri"}
    with pytest.raises(ValueError, match="Open MPI started 4 processes and does not say where process 0 is; give -"):
        of_cluster(env)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),  # jax leaves all devices to it
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "11(x2)"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "JAX_LOCAL_DEVICE_IDS": "0,1"}, False),
    ],
)
def test_a_process_alone_on_its_machine_has_all_devices(env: dict[str, str], expected: bool):
    assert launch.uses_all_devices(env) == expected
