"""The command as several processes: one speaks, the others follow, and all end where one cannot go on."""

import json
import pathlib

import pytest

from tests import local_processes, tiny_model
from tests.command_line import COMMAND, run_here

SMALL = ["--max_model_len=32", "--temperature=0", "--max_tokens=8", "--ignore_eos", "--decode_steps=1"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


def test_process_0_speaks_for_all(model_dir: pathlib.Path, capfd: pytest.CaptureFixture[str], tmp_path: pathlib.Path):
    """With its own output only: what Gloo writes to stdout must not be between the records. As on several machines."""
    (tmp_path / "prompts.txt").write_text("abc\nde\nfgh\n", encoding="utf-8")
    flags = [f"--model={model_dir}", f"--prompts_file={tmp_path / 'prompts.txt'}", *SMALL]
    flags += ["--output_file=/dev/stdout"]
    assert run_here(*flags, "--mesh=") == 0
    alone = capfd.readouterr().out
    launches = local_processes.launch_flags(2, local_processes.AS_IF_FAR)
    commands = [[*COMMAND, *flags, "--mesh=data:2", *launch] for launch in launches]
    with local_processes.started(commands) as (leader, follower):
        local_processes.wait([leader, follower], local_processes.START_S)
        assert [leader.process.returncode, follower.process.returncode] == [0, 0], leader.stderr
        assert [json.loads(line) for line in leader.stdout.splitlines()] == [*map(json.loads, alone.splitlines())]
        assert "mesh data:2 over 2 processes of 1 device on 1 machine\n" in leader.stderr
        assert (follower.stdout, follower.stderr) == ("", "process 1 of 2: follows process 0\n")


@pytest.mark.parametrize(
    ("of_leader", "of_follower", "in_leader", "in_follower"),
    [
        (
            ["--dtype=float32"],
            ["--dtype=bfloat16"],
            "--dtype is 'float32' in process 0 and 'bfloat16' in process 1; give all processes the same",
            "--dtype is 'float32' in process 0 and 'bfloat16' in process 1; give all processes the same",
        ),
        (
            ["--prompts_file=nowhere.txt"],
            [],
            "process 0 of 2: error: ",
            "process 1 of 2: process 0 of 2 ended with an error: ",
        ),
    ],
    ids=["other flags", "no prompts"],
)
def test_an_error_in_one_process_ends_all(
    of_leader: list[str], of_follower: list[str], in_leader: str, in_follower: str, model_dir: pathlib.Path
):
    launches = local_processes.launch_flags(2)
    run = [*COMMAND, f"--model={model_dir}", "--prompt=a", "--mesh=data:2", *SMALL]
    commands = [[*run, *own, *launch] for own, launch in zip((of_leader, of_follower), launches, strict=True)]
    with local_processes.started(commands) as (leader, follower):
        local_processes.wait([leader, follower], local_processes.START_S)
        assert [leader.process.returncode, follower.process.returncode] == [1, 1], leader.stderr
        assert in_leader in leader.stderr, leader.stderr
        assert in_follower in follower.stderr, follower.stderr
