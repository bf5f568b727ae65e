"""The command line: real output, and each mistake one clear line, exit code 1, no traceback."""

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy
from absl.testing import flagsaver

from jaxinfer import cli_flags, devices
from tests import tiny_model
from tests.command_line import run, run_here

SMALL = ("--max_num_seqs=2", "--max_model_len=64", "--max_num_batched_tokens=32")  # few programs to compile


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


def test_a_prompt_streams_and_ends_with_a_summary(model_dir: pathlib.Path):
    flags = (f"--model={model_dir}", "--prompt=abc", "--max_tokens=5", "--temperature=0", *SMALL)
    result = run(*flags, "--wait_for_programs")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("abc") and len(result.stdout) > 4
    for part in (
        "memory per device:",
        "tokens at once",
        "loading weights:",
        "compiling:",
        "sampling:",
        "tokens/s",
    ):
        assert part in result.stderr
    assert re.search(r"^summary: .* of [\d.]+ GB/s \(\d+%\)$", result.stderr, re.MULTILINE)
    at_once = run(*flags)
    assert at_once.returncode == 0 and at_once.stdout == result.stdout and "compiling:" not in at_once.stderr


def test_prompts_file_to_output_file_on_eight_virtual_devices(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    prompts, outputs = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "abc"}\n\n{"prompt_token_ids": [1, 2, 3]}\n')
    flags = (f"--model={model_dir}", f"--prompts_file={prompts}", "--max_tokens=5", "--temperature=0", *SMALL)
    one = run(*flags, f"--output_file={outputs}")
    assert one.returncode == 0, one.stderr
    records = [json.loads(line) for line in outputs.read_text().splitlines()]
    assert [r["prompt"] for r in records] == ["abc", None]
    assert records[1]["prompt_token_ids"] == [1, 2, 3]
    assert all(len(r["token_ids"]) == 5 and r["finish_reason"] == "length" for r in records)
    outputs_8 = tmp_path / "out8.jsonl"
    eight = run(*flags, f"--output_file={outputs_8}", "--num_cpu_devices=8", "--mesh=data:2,tensor:4")
    assert eight.returncode == 0, eight.stderr
    assert outputs_8.read_text() == outputs.read_text()


def test_stdin_lines_are_prompts(model_dir: pathlib.Path):
    result = run(f"--model={model_dir}", "--max_tokens=2", *SMALL, stdin="abc\nxyz\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("abc") and "\nxyz" in result.stdout


def test_a_traceback_only_with_verbosity_1(model_dir: pathlib.Path):
    quiet = run(f"--model={model_dir}", "--prompt=a", "--mesh=tensor:2")
    assert quiet.returncode == 1 and "Traceback" not in quiet.stderr
    assert quiet.stderr.splitlines()[-1].startswith("run_inference: error: --mesh=tensor:2 needs 2 devices")
    assert "Traceback" in run(f"--model={model_dir}", "--prompt=a", "--mesh=tensor:2", "--verbosity=1").stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_tokens=0"], "--max_tokens=0: must be an integer in [1, "),
        (["--prompt="], "prompt 1 is empty"),
        (["--mesh=tensor:16"], "--mesh=tensor:16 needs 16 devices, but there are 8 (cpu)"),
        (["--mesh=tensr:2"], "unknown mesh axis 'tensr'; known: data, stage, expert, context, tensor"),
        (["--mesh=tensor:3"], "kv_heads 2 neither divides nor is divided by the 3 devices of --mesh tensor:3"),
        (["--mesh=stage:4"], "--mesh=stage:4: the model has 2 layers; use at most that many stages"),
        (["--max_model_len=999"], "--max_model_len=999 is beyond the 256 positions"),
        (["--max_model_len=3"], "prompt of 4 tokens leaves no room to generate within --max_model_len=3"),
        (["--kv_cache_bytes=1000"], "--kv_cache_bytes=1000 is less than the "),
        (["--temperature=-1"], "--temperature=-1.0: must be a number in [0, 10000]"),
        (["--model=/nowhere"], "--model=/nowhere: no such directory"),
        (
            ["--attention_backend=magic"],
            "--attention_backend=magic: no such backend; known: auto, cpu, mosaic_gpu, triton, xla",
        ),
        (["--moe_backend=triton"], "--moe_backend=triton: llama has no experts here; leave it out"),
        (["--prompts_file=/nowhere.txt"], "--prompts_file=/nowhere.txt: No such file or directory"),
        (["stray"], "unexpected argument 'stray'"),
        (["--max_num_seqs=0"], "--max_num_seqs=0: must be an integer of at least 1"),
        (["--max_tokens=many"], "flag --max_tokens=many: invalid literal"),
        (["--num_cpu_devices=0"], "flag --num_cpu_devices=0: 0 is not a positive integer"),
        (["--dtype=int8"], "flag --dtype=int8: value should be one of <auto|float32"),
        (["--max_tokns=5"], "Unknown command line flag 'max_tokns'. Did you mean: max_tokens"),
        (["--output_file=/nowhere/out.jsonl"], "--output_file=/nowhere/out.jsonl: there is no directory /nowhere"),
        (["--output_file=/"], "--output_file=/: is a directory; name a file in it"),
        (["--num_cpu_devices=2"], "set_num_cpu_devices must be called before jax is imported"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_line(model_dir: pathlib.Path, capsys, flags: list[str], message: str):
    assert run_here(f"--model={model_dir}", "--prompt=abc", *flags) == 1
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("run_inference: error: ") and message in last
    assert "Traceback" not in captured.err and captured.out == ""


@pytest.fixture
def broken_dir(model_dir: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the model for a test to break."""
    return shutil.copytree(model_dir, tmp_path / "broken")


def test_an_unknown_architecture_lists_the_known_ones(broken_dir: pathlib.Path, capsys):
    config = json.loads((broken_dir / "config.json").read_text())
    (broken_dir / "config.json").write_text(json.dumps({**config, "architectures": ["AlienForCausalLM"]}))
    assert run_here(f"--model={broken_dir}", "--prompt=abc") == 1
    assert "'AlienForCausalLM' is not supported; known: BertModel, DeepseekV2ForCausalLM, " in capsys.readouterr().err


def test_a_directory_without_config_says_so(broken_dir: pathlib.Path, capsys):
    (broken_dir / "config.json").unlink()
    assert run_here(f"--model={broken_dir}", "--prompt=abc") == 1
    assert "no config.json there" in capsys.readouterr().err


def test_no_prompt_says_how_to_give_one(model_dir: pathlib.Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n  \n"))
    assert run_here(f"--model={model_dir}") == 1
    assert 'error: no prompt; give --prompt="Once upon a time", --prompts_file, or lines' in capsys.readouterr().err


def change_weights(model_dir: pathlib.Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = safetensors.numpy.load_file(model_dir / "model.safetensors")
    change(weights)
    safetensors.numpy.save_file(weights, model_dir / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "model.norm.weight"),
        (lambda weights: weights.update(stray=np.zeros(3, np.float32)), "stray"),
        (lambda weights: weights.update({"model.norm.weight": np.zeros(3, np.float32)}), "model.norm.weight"),
    ],
    ids=["missing tensor", "extra tensor", "wrong shape"],
)
def test_weights_that_are_not_the_models_are_one_line(broken_dir: pathlib.Path, capsys, change, name: str):
    change_weights(broken_dir, change)
    assert run_here(f"--model={broken_dir}", "--prompt=abc") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("run_inference: error: ") and name in last


def test_a_missing_shard_is_one_line(broken_dir: pathlib.Path, capsys):
    names = safetensors.numpy.load_file(broken_dir / "model.safetensors")
    (broken_dir / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (broken_dir / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert run_here(f"--model={broken_dir}", "--prompt=abc") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("run_inference: error: ") and "model-00001-of-00001.safetensors" in last


def test_truncated_weights_are_one_line_too(broken_dir: pathlib.Path, capsys):
    weights = broken_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run_here(f"--model={broken_dir}", "--prompt=abc") == 1
    assert "model.safetensors" in capsys.readouterr().err.splitlines()[-1]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: pathlib.Path, capsys):
    small = tiny_model.make(tmp_path / "small", vocab_size=128, eos_token_id=5)
    assert run_here(f"--model={small}", "--prompt=abc") == 1
    assert "the tokenizer has 257 tokens and config.json's vocab_size is 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "platforms"),
    [
        ((), None),
        (("--allow_cpu",), "cpu"),
        (("--num_cpu_devices=8",), "cpu"),
        (("--num_cpu_devices=8", "--allow_cpu"), "cpu"),
    ],
)
def test_what_asks_for_the_cpu_gets_it_beside_a_gpu(
    model_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], platforms: str | None
):
    """--allow_cpu only silenced the check, and took from --num_cpu_devices what it does to run on the CPU."""

    def stop(allow_cpu: bool) -> None:
        raise RuntimeError("far enough")

    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(devices, "set_num_cpu_devices", lambda count: None)
    monkeypatch.setattr(devices, "check_accelerator", stop)
    assert run_here(f"--model={model_dir}", "--prompt=abc", *flags) == 1
    assert os.environ.get("JAX_PLATFORMS") == platforms


def test_a_gpu_that_jax_cannot_use_is_one_line(model_dir: pathlib.Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: True)
    assert run_here(f"--model={model_dir}", "--prompt=abc") == 1
    assert "error: an NVIDIA GPU is present but JAX runs on the CPU" in capsys.readouterr().err.splitlines()[-1]


def test_the_models_wishes_are_told_and_can_be_left_aside(broken_dir: pathlib.Path, capsys):
    wishes = {"temperature": 0.5, "top_p": 0.25, "num_beams": 4}
    (broken_dir / "generation_config.json").write_text(json.dumps(wishes), encoding="utf-8")
    flags = (f"--model={broken_dir}", "--prompt=abc", "--max_tokens=2", "--decode_steps=1", *SMALL)
    assert run_here(*flags) == 0
    err = capsys.readouterr().err
    assert "temperature=0.5, top_k=0, top_p=0.25" in err
    assert "generation_config.json asks for more, not applied: num_beams=4\n" in err
    assert run_here(*flags, "--generation_config=none") == 0
    err = capsys.readouterr().err
    assert "temperature=1.0, top_k=0, top_p=1.0" in err and "asks for more" not in err


def test_the_console_scripts_help_shows_the_flags():
    """absl's --help shows the flags of the file that runs, and that is another one than where ours are."""
    script = "from jaxinfer.run_inference import cli; cli()"
    result = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=False)
    assert "--prompts_file:" in result.stdout and "--memory_fraction:" in result.stdout


@pytest.mark.parametrize(
    ("mesh", "sharding", "num_seqs"),
    [("", "auto", 1), ("tensor:4", "auto", 1), ("data:2,expert:2", "auto", 4), ("data:2,expert:2", "expert_sums", 2)],
)
def test_without_a_flag_there_are_sequences_for_every_data_shard(mesh: str, sharding: str, num_seqs: int):
    with flagsaver.as_parsed(mesh=mesh, sharding=sharding):
        assert cli_flags.default_num_seqs(1) == num_seqs
