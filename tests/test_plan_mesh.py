"""`plan_mesh`: what it prints, and what it refuses, each in a line."""

import gc
import json
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxinfer import cli_flags, plan_flags, plan_mesh
from jaxinfer import devices as jax_devices
from jaxinfer.engine_config import EngineConfig
from jaxinfer.planning import calibration, target
from tests import plans, published, tiny_model
from tests.command_line import environment

LLAMA_70B = str(published.DIRECTORY / "llama_3_1_70b_instruct.json")
LLAMA_8B = str(published.DIRECTORY / "llama_3_1_8b_instruct.json")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command, here."""
    with flagsaver.flagsaver():
        try:
            code = plan_mesh.main(plan_flags.parse(["plan_mesh", *arguments]))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    out, err = capsys.readouterr()
    return code, out, err


def test_the_program(tmp_path: pathlib.Path):
    command = [sys.executable, "-m", "jaxinfer.plan_mesh", f"--model={LLAMA_70B}", "--devices=h100:8"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment(PYTHONPATH=str(plan_root()))
    )
    assert "70.55 billion parameters, 131.42 GiB of weights" in result.stdout
    assert "8 x NVIDIA H100 80GB HBM3, 1 node of 8 over NVLink 4" in result.stdout
    assert "2 of 20 meshes cannot be:" in result.stdout and not result.stderr
    assert re.search(r"^ 1  data:2,tensor:4 +32\.86 GiB", result.stdout, re.MULTILINE)
    assert "times are computed, not measured" in result.stdout


def plan_root() -> pathlib.Path:
    return pathlib.Path(plan_mesh.__file__).parents[1]


def test_the_command_that_it_prints_is_one_for_run_inference(capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(
        capsys, f"--model={LLAMA_8B}", "--devices=h100:2", "--kv_cache_dtype=int8", "--memory_fraction=0.8"
    )
    assert code == 0
    before, *command = shlex.split(out.strip().splitlines()[-1])
    assert before == "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" and command[0] == "run_inference"
    with flagsaver.flagsaver():
        cli_flags.parse(command)
        settings: dict[str, Any] = {n: flags.FLAGS[n].value for n in ("mesh", "max_model_len", "max_num_seqs")}
        config = EngineConfig(**settings)
        assert flags.FLAGS["model"].value == "path/to/model"
        assert (flags.FLAGS["kv_cache_dtype"].value, flags.FLAGS["memory_fraction"].value) == ("int8", 0.8)
    assert config.mesh == "data:2" and config.max_model_len == 1024 + 256 and config.max_num_seqs > 100


def test_over_several_nodes_it_is_a_command_for_each(capsys: pytest.CaptureFixture[str]):
    flags_of = [f"--model={LLAMA_70B}", "--devices=h100:2x8", "--mesh=stage:2,tensor:8"]
    _, out, _ = run(capsys, *flags_of)
    assert out.rstrip().endswith("--coordinator_address=HOST:PORT --num_processes=2 --process_id=ID")
    _, out, _ = run(capsys, *flags_of[:1], "--devices=h100:2x8", "--mesh=tensor:8")
    assert "--num_processes" not in out


def test_a_directory_and_the_demonstration_model(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path):
    directory = tiny_model.make(tmp_path / "tiny model")
    code, out, _ = run(capsys, f"--model={directory}", "--devices=l40s")
    assert code == 0 and f"--model='{directory}'" in out and "requests of 192 + 64 tokens" in out
    code, out, _ = run(capsys, "--devices=l40s")
    assert code == 0 and "--model" not in out.splitlines()[-1]


def test_links_that_are_given_count(capsys: pytest.CaptureFixture[str]):
    asked = [f"--model={LLAMA_70B}", "--devices=h100:8", "--mesh=tensor:8", "--max_num_seqs=1", "--objective=latency"]
    tpots = []
    for link in ([], ["--link_latency_s=100e-6", "--link_gb_s=10"]):
        _, out, _ = run(capsys, *asked, *link)
        tpots.append(float(re.findall(r"1  tensor:8 .* ms +([\d.]+) ms", out)[0]))
    assert tpots[1] - tpots[0] > 161 * 0.09  # milliseconds: two sums a layer, and one
    assert "a link at 10 GB/s and 100 us" in out


def test_what_if_weights_were_packed(capsys: pytest.CaptureFixture[str]):
    _, out, _ = run(capsys, f"--model={LLAMA_70B}", "--devices=h100", "--weight_dtype=int4", "--top=1")
    assert "32.85 GiB of weights" in out or "32.86 GiB of weights" in out
    assert "no engine loads weights of int4 yet" in out and "to run the first" not in out


def test_weights_that_are_packed_in_a_way_of_their_own(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path):
    """As DeepSeek publishes its V3: no engine loads it, and what it would need can be planned."""
    values = json.loads((published.DIRECTORY / "deepseek_v3.json").read_text("utf-8"))
    values["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(values), "utf-8")
    asked = [f"--model={tmp_path / 'config.json'}", "--devices=h200:8", "--mesh=tensor:8"]
    code, _, err = run(capsys, *asked)
    assert code == 1 and "quant_method 'fp8', which is not implemented" in err
    assert err.endswith("; --weight_dtype plans for packed weights\n")
    values["auto_map"] = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(values), "utf-8")
    code, out, _ = run(capsys, *asked, "--weight_dtype=fp8")
    assert code == 0 and "671.03 billion parameters, 624.94 GiB of weights" in out.splitlines()[0]


@pytest.mark.parametrize("devices", ["h100:2", "cpu:2"])
def test_steps_are_compiled(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, devices: str
):
    """For CPU devices here; a GPU's need its plugin (tests/test_compiled_for_gpus.py)."""
    monkeypatch.setattr(calibration, "measure_rates", lambda: plans.CPU_RATES)
    monkeypatch.setattr(jax_devices, "set_num_cpu_devices", lambda count: None)  # there are eight
    monkeypatch.setattr(target, "missing", lambda: "jax-cuda12-plugin is not installed")
    directory = tiny_model.make(tmp_path / "tiny")
    asked = [f"--model={directory}", f"--devices={devices}", "--max_num_seqs=2", "--compile=1", "--mesh=tensor:2"]
    code, out, err = run(capsys, *asked)
    assert code == 0, err
    stands_in = "virtual CPU devices, whose temporaries are only near those of a NVIDIA H100"
    assert (stands_in in out) == (devices == "h100:2")
    _, _, compiled = out.partition("steps compiled for ")
    assert compiled.count("of arguments (+0 bytes)") == 2, "one that decodes and one that prefills"
    assert "all-reduce" in compiled and "over tensor: " in compiled
    assert re.search(r"the most is [\d.]+ [KM]iB, planned [\d.]+ [KM]iB \([+-]", compiled)
    assert re.search(r"^compiled in [\d.]+ s$", compiled, re.MULTILINE) and gc.isenabled()


def test_pictures(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path):
    path = tmp_path / "plan.svg"
    code, out, err = run(capsys, f"--model={LLAMA_70B}", "--devices=h100:8", "--top=2", "--bars", f"--plot={path}")
    assert code == 0 and err == f"plan_mesh: wrote {path}\n"
    assert "Memory of a device, 79.11 GiB:" in out and "Time of a step that decodes:" in out
    assert "data:2,tensor:4" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices=h100:8", "--plot=plan.gif"], "--plot=plan.gif: must end in "),
        ([], "--devices is missing; give what to plan for, as --devices=h100:8"),
        (["--devices=h100:0"], "--devices=h100:0: must be 1 to 4096 devices"),
        (["--devices=h1000:8"], "unknown device 'h1000'; did you mean 'h100'?"),
        (["--devices=h100:8", "--mesh=tensor:16"], "--mesh=tensor:16 needs 16 devices, and --devices has 8"),
        (["--devices=h100:8", "--mesh=rows:2"], "unknown mesh axis 'rows'"),
        (["--devices=h100:8", "--prompt_tokens=131072"], "131328 tokens are beyond the 131072 positions"),
        (
            ["--devices=h100:8", "--max_model_len=100", "--prompt_tokens=90"],
            "--max_model_len=100 is less than the 115 tokens of a request",
        ),
        (
            ["--devices=h100:8", "--expert_placement=file"],
            "--expert_placement=file: is for one mesh; give it as --mesh",
        ),
        (["--devices=cpu", "--link_gb_s=100"], "--link_gb_s=100.0: --devices=cpu has no links"),
        (["--devices=h100:8", "--compile=1", "--weight_dtype=int4"], "there is no program for --weight_dtype=int4 yet"),
        (["--devices=h100:8", "--max_model_len=200000"], "200000 tokens are beyond the 131072 positions"),
        (["--devices=h100:8", "--qps=0"], "--qps=0.0: must be above 0"),
        (["--devices=h100:8", "--link_gb_s=-1"], "--link_gb_s=-1.0: must be above 0"),
        (["--devices=h100:8", "--mem_fraction=1.5"], "--mem_fraction=1.5: must be above 0 and at most 1"),
        (["--devices=h100:8", "--objective=fast"], "flag --objective=fast: value should be one of"),
        (["--devices=h100:8", "--model=/nowhere"], "--model=/nowhere: no such directory"),
        (["--devices=h100:8", "tensor:8"], "unexpected argument 'tensor:8'"),
        (
            ["--devices=rtx3090-24g:4"],
            "none of these meshes can be, as the lines above say; --devices=rtx3090-24g:2x4 would do",
        ),
        (["--devices=h100:2", "--qps=1e9"], "none of these meshes can be"),
    ],
)
def test_nonsense_is_refused_in_a_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    model = [] if any(argument.startswith("--model") for argument in arguments) else [f"--model={LLAMA_70B}"]
    code, _, err = run(capsys, *model, *arguments)
    assert code == 1
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("plan_mesh: error: ") and message in line


def test_an_encoder_and_a_file_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path):
    encoder = published.DIRECTORY / "bge_small_en_v1_5.json"
    assert "is an encoder" in run(capsys, f"--model={encoder}", "--devices=h100")[2]
    (tmp_path / "config.json").write_text("[1, 2]")
    code, _, err = run(capsys, f"--model={tmp_path / 'config.json'}", "--devices=h100")
    assert code == 1 and "config.json" in err and len(err.splitlines()) == 1
