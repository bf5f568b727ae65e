"""The benchmarks run, small, and leave a record with which they can be repeated."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import jax
import pytest

from jaxinfer.tools import bench_all, bench_page, bench_peer, bench_record
from pallas_kernels.grouped_matmul import backends
from tests import tiny_model
from tests.long_campaign import only_long

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ("--rounds=1", "--batch_sizes=2", "--prompt_tokens=5", "--new_tokens=6", "--decode_steps=3")


def run(program: str, *flags: str) -> dict[str, Any]:
    """The record of a run, which is the last line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"tools/{program}.py", *flags]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["command"] == " ".join(["python", f"tools/{program}.py", *flags])
    assert record["versions"]["jax"] == jax.__version__ and record["machine"]["cores"] >= 1
    return record


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny", model_type="llama", seed=1)


def test_decode_alone(model_dir: pathlib.Path):
    record = run("bench_decode", f"--model={model_dir}", "--peers=", *SMALL)
    (result,) = record["results"]
    assert result["batch_size"] == 2 and result["prompt_tokens"] == 5
    assert result["tokens_per_s"] > 0 and result["prefill_tokens_per_s"] > 0
    assert result["step_bytes"] > record["num_params"] * 4
    assert "torch" not in record["versions"] and not {*result} & {*bench_peer.PEERS}


@pytest.mark.parity
def test_decode_beside_transformers(model_dir: pathlib.Path):
    record = run("bench_decode", f"--model={model_dir}", "--peers=hf", "--peer_threads=1", *SMALL)
    (result,) = record["results"]
    assert result["hf"]["threads"] == 1 and result["hf"]["decode_ratio"] > 0 and result["hf"]["prefill_ratio"] > 0
    assert result["hf"]["compared_tokens"] == 2 * 7 and result["hf"]["equal_tokens"] >= 7
    assert "torch" in record["versions"]


@only_long
@pytest.mark.parity
def test_decode_beside_compiled_transformers(model_dir: pathlib.Path):
    (result,) = run("bench_decode", f"--model={model_dir}", "--peers=hf_compiled", "--peer_threads=1", *SMALL)[
        "results"
    ]
    assert result["hf_compiled"]["equal_tokens"] >= 7


@pytest.mark.parametrize(
    ("dtype", "heads"), [("float32", {}), ("float16", {"num_key_value_heads": 8, "tie_word_embeddings": False})]
)
def test_decode_beside_llama_cpp(tmp_path: pathlib.Path, dtype: str, heads: dict[str, Any]):
    pytest.importorskip("llama_cpp")
    model_dir = tiny_model.make(tmp_path / "tiny", model_type="llama", seed=1, **heads)
    record = run("bench_decode", f"--model={model_dir}", f"--dtype={dtype}", "--peers=llama_cpp", *SMALL)
    (result,) = record["results"]
    assert result["llama_cpp"]["compared_tokens"] == 2 * 7 and result["llama_cpp"]["equal_tokens"] >= 7


def test_peers_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="unknown vllm; known: hf, hf_compiled, llama_cpp"):
        bench_peer.check(["hf", "vllm"])


def test_sampling():
    flags = ("--batch_sizes=2", "--vocab_size=300", "--rounds=2", "--peers=sort", "--shape=12m", "--layers=1")
    *ways, step = run("bench_sampling", *flags)["results"]
    assert {way["way"] for way in ways} == {"greedy", "all", "top_p", "top_k", "both"} and len(ways) == 10
    assert all(way["ours_s"] > 0 and way["sort_ratio"] > 0 for way in ways)
    assert step["step_s"] > 0 and step["sampling_share"] < 1


def test_tuning(tmp_path: pathlib.Path):
    sizes = ("--heads=2,1,16", "--page_size=16", "--dtype=float32")
    record = run("tune_kernel", "--quick", "--decode=zipf2x40", "--prefill=1x32", *sizes, f"--folder={tmp_path}")
    kept = json.loads((tmp_path / "cpu.json").read_text())
    assert kept == record["results"] and record["file"] == str(tmp_path / "cpu.json")
    assert [entry["kernel"] for entry in kept] == [f"paged_attention/triton/{kind}" for kind in ("decode", "prefill")]
    assert all(entry["settings"]["block_tokens"] in (32, 64) for entry in kept)


def test_host():
    record = run("bench_host", "--running=2", "--steps=3", "--loads=mix", "--page_sizes=16")
    assert [(row["load"], row["running"]) for row in record["results"]] == [("mix", 2)]


@only_long
@pytest.mark.parity
def test_offline_beside_its_peers():
    flags = ("--requests=6", "--batch_size=2", "--scale=0.02", "--rounds=1", "--layers=1")
    results = run("bench_offline", *flags)["results"]
    assert results["requests_all_equal"] >= 4 and results["transformers"]["ratio"] > 0
    assert set(results) >= {"ours", "transformers", "transformers_sorted"}


def test_offline():
    flags = ("--requests=3", "--batch_size=2", "--scale=0.02", "--rounds=1", "--layers=1", "--peers=")
    results = run("bench_offline", *flags)["results"]
    assert results["output_tokens"] >= 6 and results["ours"]["tokens_per_s"] > 0


def test_prefix():
    flags = ("--shape=12m", "--layers=1", "--requests=3", "--batch_size=2", "--prompt_tokens=32", "--output_tokens=2")
    results = run("bench_prefix", "--rounds=1", "--shared=0.5", "--turns=2", *flags)["results"]
    assert [row["shared"] for row in results["throughput"]] == [0.5] and results["turns"]["ratio"] > 0
    assert results["first_token"]["hit_s"] > 0 and results["first_token"]["ratio"] > 0


def test_load():
    flags = ("--shape=12m", "--layers=1", "--rounds=1", "--prompt_tokens=32", "--batch_size=2", "--chunk_tokens=32")
    (result,) = run("bench_load", *flags)["results"]
    assert result["chunk_tokens"] == 32 and result["idle_s"] > 0 and result["quiet_gap_s"] > 0 and result["ratio"] > 0


def test_all_of_them_make_a_page(tmp_path: pathlib.Path):
    """A record anew, beside those that were there."""
    for path in (ROOT / "docs" / "benchmarks").glob("*_cpu.json"):
        shutil.copy(path, tmp_path)
    command = ["tools/bench_all.py", "--only=host", "--more=--running=2 --steps=3", f"--folder={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert json.loads((tmp_path / "host_cpu.json").read_text())["command"].endswith("--running=2 --steps=3")
    page = (tmp_path / "cpu.md").read_text()
    assert "| 254 M | 1 | 32 |" in page and "to its first text" in page and "--running=2 --steps=3" in page
    for picture in re.findall(r"\((cpu_\w+\.svg)\)", page):
        assert (tmp_path / picture).read_text().lstrip().startswith("<?xml")
    first = (tmp_path / "cpu_startup.svg").read_bytes()
    bench_page.write(tmp_path, bench_all.records(tmp_path))
    assert (tmp_path / "cpu_startup.svg").read_bytes() == first


def test_experts():
    record = run("bench_grouped", "--experts=4,2,32,48", "--tokens=1,20", "--dtype=float32", "--quick")
    one, many = record["results"]
    assert one["experts_used"] == 2 and 2 * one["bytes"] == many["bytes"] == 4 * 4 * 3 * 32 * 48
    for name in (*backends(), "jax.lax.ragged_dot"):
        assert max(one[name]["error"], many[name]["error"]) < 1e-5 and one[name]["bytes_per_s"] > 0


def test_the_commit_tells_changes_and_foreign_repositories(tmp_path: pathlib.Path):
    def git(*arguments: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        result = subprocess.run(["git", "-C", tmp_path, *names, *arguments], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    git("init")
    assert bench_record.commit(tmp_path) == "unknown"
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("a")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "record").write_text("a")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "v1")
    assert bench_record.commit(tmp_path) == git("rev-parse", "HEAD")
    assert bench_record.commit(tmp_path / "inner") == "unknown"
    (tmp_path / "docs" / "record").write_text("b")
    assert bench_record.commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "inner" / "file").write_text("b")
    assert bench_record.commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_tokens_count_as_equal_up_to_the_first_difference():
    assert bench_peer.count_equal([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 2, 3], [4, 0, 6], [0, 8, 9]]) == 3 + 1 + 0
