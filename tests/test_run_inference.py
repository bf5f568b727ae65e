"""The command line: real output, and each mistake one clear line, exit code 1, no traceback."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

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
    assert "Traceback" in run(f"--model={model_dir}", "--prompt=a", "--mesh=tensor:3", "--verbosity=1").stderr


def _without(model_dir: pathlib.Path, tmp_path: pathlib.Path, name: str) -> pathlib.Path:
    copy = tmp_path / "broken"
    shutil.copytree(model_dir, copy)
    (copy / name).unlink()
    return copy


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_tokens=0"], "--max_tokens=0: must be an integer in [1, "),
        (["--prompt="], "prompt 1 is empty"),
        (["--mesh=tensor:16"], "--mesh=tensor:16 needs 16 devices, but there are 1 (cpu)"),
        (["--mesh=tensr:2"], "unknown mesh axis 'tensr'; known: data, stage, expert, context, tensor"),
        (["--num_cpu_devices=8", "--mesh=tensor:3"], "does not divide over --mesh tensor:3"),
        (["--num_cpu_devices=2", "--mesh=stage:2"], "no sharding strategy splits over stage together"),
        (["--max_model_len=999"], "--max_model_len=999 is beyond the 256 positions"),
        (["--max_model_len=3"], "prompt of 4 tokens leaves no room to generate within --max_model_len=3"),
        (["--kv_cache_bytes=1000"], "--kv_cache_bytes=1000 leaves 0.0 MiB for the cache, 0 tokens; one sequence of"),
        (["--temperature=-1"], "--temperature=-1.0: must be a number in [0, 10000]"),
        (["--model=/nowhere"], "--model=/nowhere: no such directory"),
        (["--attention_backend=magic"], "--attention_backend=magic: no such backend; known: xla"),
        (["--prompts_file=/nowhere.txt"], "--prompts_file=/nowhere.txt: no such file"),
        (["stray"], "unexpected argument 'stray'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_line(model_dir: pathlib.Path, flags: list[str], message: str):
    result = run(f"--model={model_dir}", "--prompt=abc", *flags)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("run_inference: error: ") and message in last
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_an_unknown_architecture_lists_the_known_ones(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    copy = tmp_path / "alien"
    shutil.copytree(model_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["AlienForCausalLM"]}))
    result = run(f"--model={copy}", "--prompt=abc")
    assert result.returncode == 1
    assert "architecture 'AlienForCausalLM' is not supported; known: LlamaForCausalLM" in result.stderr


def test_a_model_without_weights_or_config_says_so(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    result = run(f"--model={_without(model_dir, tmp_path, 'config.json')}", "--prompt=abc")
    assert result.returncode == 1 and "no config.json there" in result.stderr


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: pathlib.Path):
    small = tiny_model.make(tmp_path / "small", vocab_size=128, eos_token_id=5)
    result = run(f"--model={small}", "--prompt=abc")
    assert result.returncode == 1
    assert "the tokenizer has 257 tokens and config.json's vocab_size is 128" in result.stderr
