"""The command line: real output, and each mistake one clear line, exit code 1, no traceback."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from absl import flags as flags_module
from absl.testing import flagsaver

from jaxinfer import run_inference
from tests import tiny_model

COMMAND = [sys.executable, "-m", "jaxinfer.run_inference", "--compilation_cache_dir="]


def run(*flags: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    return subprocess.run(
        [*COMMAND, *flags], capture_output=True, text=True, input=stdin, env=env, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


def test_a_prompt_streams_and_ends_with_a_summary(model_dir: pathlib.Path):
    result = run(f"--model={model_dir}", "--prompt=abc", "--max_tokens=5", "--temperature=0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("abc") and len(result.stdout) > 4
    for part in (
        "memory per device:",
        "tokens at once",
        "loading weights:",
        "compiling:",
        "sampling:",
        "tokens/s",
        "GB/s",
    ):
        assert part in result.stderr


def test_prompts_file_to_output_file_on_eight_virtual_devices(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    prompts, outputs = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "abc"}\n\n{"prompt_token_ids": [1, 2, 3]}\n')
    flags = (f"--model={model_dir}", f"--prompts_file={prompts}", "--max_tokens=5", "--temperature=0")
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
    result = run(f"--model={model_dir}", "--max_tokens=2", stdin="abc\nxyz\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("abc") and "\nxyz" in result.stdout


def test_a_traceback_only_with_verbosity_1(model_dir: pathlib.Path):
    quiet = run(f"--model={model_dir}", "--prompt=a", "--mesh=tensor:2")
    assert quiet.returncode == 1 and "Traceback" not in quiet.stderr
    assert quiet.stderr.splitlines()[-1].startswith("run_inference: error: --mesh=tensor:2 needs 2 devices")
    assert "Traceback" in run(f"--model={model_dir}", "--prompt=a", "--mesh=tensor:2", "--verbosity=1").stderr


def run_here(*flags: str) -> int:
    """The exit code of the command in this process, which has eight virtual devices. Much faster than `run`."""
    with flagsaver.flagsaver():
        arguments = flags_module.FLAGS(["run_inference", "--compilation_cache_dir=", *flags])
        return run_inference.main(arguments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_tokens=0"], "--max_tokens=0: must be an integer in [1, "),
        (["--prompt="], "prompt 1 is empty"),
        (["--mesh=tensor:16"], "--mesh=tensor:16 needs 16 devices, but there are 8 (cpu)"),
        (["--mesh=tensr:2"], "unknown mesh axis 'tensr'; known: data, stage, expert, context, tensor"),
        (["--mesh=tensor:3"], "kv_heads 2 neither divides nor is divided by the 3 devices of --mesh tensor:3"),
        (["--mesh=stage:2"], "no sharding strategy splits over stage together"),
        (["--max_model_len=999"], "--max_model_len=999 is beyond the 256 positions"),
        (["--max_model_len=3"], "prompt of 4 tokens leaves no room to generate within --max_model_len=3"),
        (["--kv_cache_bytes=1000"], "--kv_cache_bytes=1000 leaves 1000 B for the cache, 0 tokens; one sequence of"),
        (["--temperature=-1"], "--temperature=-1.0: must be a number in [0, 10000]"),
        (["--model=/nowhere"], "--model=/nowhere: no such directory"),
        (["--attention_backend=magic"], "--attention_backend=magic: no such backend; known: xla"),
        (["--prompts_file=/nowhere.txt"], "--prompts_file=/nowhere.txt: no such file"),
        (["stray"], "unexpected argument 'stray'"),
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
    assert "'AlienForCausalLM' is not supported; known: LlamaForCausalLM" in capsys.readouterr().err


def test_a_directory_without_config_says_so(broken_dir: pathlib.Path, capsys):
    (broken_dir / "config.json").unlink()
    assert run_here(f"--model={broken_dir}", "--prompt=abc") == 1
    assert "no config.json there" in capsys.readouterr().err


def test_truncated_weights_are_one_line_too(broken_dir: pathlib.Path, capsys):
    weights = broken_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run_here(f"--model={broken_dir}", "--prompt=abc") == 1
    assert "model.safetensors" in capsys.readouterr().err.splitlines()[-1]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: pathlib.Path, capsys):
    small = tiny_model.make(tmp_path / "small", vocab_size=128, eos_token_id=5)
    assert run_here(f"--model={small}", "--prompt=abc") == 1
    assert "the tokenizer has 257 tokens and config.json's vocab_size is 128" in capsys.readouterr().err
