"""Writes the README's generated parts: what works, from the code and tests that make it work; how fast, from
docs/benchmarks; and what the first command prints, from running it.

python tools/readme_tables.py              # prints the README as it should be
python tools/readme_tables.py --update     # puts the tables between their markers
python tools/readme_tables.py --first_run  # runs the first command and puts its output between its markers
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap

import sharding_rules
from jaxinfer import Engine, SamplingParams, models
from jaxinfer.checkpoint.hf_index import INDEX_FILE, SINGLE_FILE
from jaxinfer.tools import parallel_matrix, plan_cases
from pallas_kernels import grouped_matmul, paged_attention
from pallas_kernels.paged_attention import AttentionSpec
from pallas_kernels.paged_attention.pages import LARGEST

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MATRIX = ROOT / "docs" / "parallel_matrix.md"
COMMAND = "python tools/readme_tables.py --update"
FIRST_RUN_COMMAND = "python tools/readme_tables.py --first_run"
_WIDTH = 118  # of the lines of the first command's output
_MOST_LINES = 3  # that one line of it is folded into


def support() -> str:
    """Markdown: every family, strategy and kernel that the code finds, and the public names of the rest."""
    rows = ["| what | which | shown by |", "|---|---|---|"]
    for name in models.families():
        family = models.get(name)
        configs = ", ".join(config.replace("_", " ") for config in family.TINY_CONFIGS)
        which = ", ".join(family.ARCHITECTURES)
        kind, shown_by = ("embedding model", "encoders") if models.is_encoder(family) else ("model family", "families")
        rows.append(f"| {kind} | {which} ({configs}) | `tests/parity`, `tests/test_{shown_by}.py` |")
    rows += [f"| sharding | `{name}` | `tests/test_sharding_rules.py` |" for name in sharding_rules.strategies()]
    axes = ", ".join(f"`{axis}`" for axis in parallel_matrix.AXES)
    found = parallel_matrix.counts(parallel_matrix.read_record(MATRIX.with_suffix(".json")))
    document = MATRIX.relative_to(ROOT).as_posix()
    rows.append(f"| mesh | {axes}, pairs and triples of them, all decoders: {found} | [{document}]({document}) |")
    for name in paged_attention.backends():
        test = "test_mosaic_gpu" if name == "mosaic_gpu" else "test_paged_attention"
        rows.append(f"| paged attention | `{name}` | `tests/{test}.py` |")
    rows += [f"| cache of 8 bits | `{name}` | `tests/test_quantized_cache.py` |" for name in sorted(LARGEST)]
    rows += [f"| experts' products | `{name}` | `tests/test_grouped_matmul.py` |" for name in grouped_matmul.backends()]
    rows.append(f"| weights | safetensors: `{SINGLE_FILE}`, or `{INDEX_FILE}` and shards | `tests/hf_reader` |")
    rows.append("| weights | MXFP4 in gpt-oss' files, unpacked to bfloat16 | `tests/test_mxfp4.py` |")
    rows.append("| weights | Orbax, both ways, as `convert_checkpoint` writes it | `tests/test_conversion.py` |")
    rows.append(
        "| several processes | by flags, SLURM, Open MPI 4, Kubernetes; decoders | `tests/test_several_processes.py` |"
    )
    presets = ", ".join(f"`{path.stem}`" for path in sorted((ROOT / "configs").glob("*.toml")))
    rows.append(f"| preset in `configs/` | {presets} | `tests/test_presets.py`, `tests/test_config_file.py` |")
    parameters = ", ".join(f"`{field.name}`" for field in dataclasses.fields(SamplingParams))
    rows.append(f"| sampling | {parameters} | `tests/test_sampling.py`, `tests/test_sampling_extras.py` |")
    methods = ", ".join(f"`{name}`" for name, value in vars(Engine).items() if name[0] != "_" and callable(value))
    rows.append(f"| engine | {methods} | `tests/engine`, `tests/test_beam_search.py` |")
    return "\n".join(rows)


@dataclasses.dataclass(frozen=True)
class GPU:
    """One that need not be here, for what asks a `jax.Device` what it is."""

    device_kind: str
    compute_capability: str
    platform: str = "gpu"


GPUS = [
    GPU("Tesla V100", "7.0"),
    GPU("Tesla T4", "7.5"),
    GPU("NVIDIA A100", "8.0"),
    GPU("NVIDIA RTX A6000", "8.6"),
    GPU("NVIDIA L40S", "8.9"),
    GPU("NVIDIA H100, H200", "9.0"),
    GPU("NVIDIA B200", "10.0"),
]


def kernels() -> str:
    """Markdown: what `auto` takes on each GPU."""
    attention = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=64, scale=1.0)
    rows = [
        "| GPU | compute capability | attention | over a cache of int8 | of fp8 | experts |",
        "|---|--:|---|---|---|---|",
    ]
    for gpu in GPUS:
        caches = (None, "int8", "float8_e4m3fn")
        specs = [dataclasses.replace(attention, cache_dtype=cache_dtype) for cache_dtype in caches]
        names = [paged_attention.choose([spec], gpu).name for spec in specs]  # pyright: ignore[reportArgumentType]
        names.append(grouped_matmul.choose([4096], gpu).name)  # pyright: ignore[reportArgumentType]
        cells = " | ".join(f"`{name}`" for name in names)
        rows.append(f"| {gpu.device_kind} | {gpu.compute_capability} | {cells} |")
    return "\n".join(rows)


def speed() -> str:
    """Markdown: what `bench_decode.py` found, with how many times as fast ours is as each peer."""
    peers = {"hf": "Hugging Face eager", "hf_compiled": "torch.compile", "llama_cpp": "llama.cpp"}
    heads = ["model", "device", "batch", "tokens/s", "of measured bandwidth", *(f"x {name}" for name in peers.values())]
    rows = [f"| {' | '.join(heads)} |", "|---|---" + "|--:" * (len(heads) - 2) + "|"]
    for path in sorted((ROOT / "docs" / "benchmarks").glob("decode_*.json")):
        record = json.loads(path.read_text("utf-8"))
        machine = record["machine"]
        model = f"{record['num_params'] / 1e6:.0f} M Llama, {record['dtype']}"
        device = f"{machine['cores']} cores, {machine['cpu']}" if machine["device"] == "cpu" else machine["device"]
        for result in record["results"]:
            ratios = [f"{result[name]['decode_ratio']:.2f}" if name in result else "" for name in peers]
            share = f"{result['bandwidth_share']:.0%}"
            cells = [model, device, result["batch_size"], f"{result['tokens_per_s']:.0f}", share, *ratios]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def first_run(text: str) -> str:
    """Markdown: what the first command in the README `text` prints with nothing compiled before, lines folded."""
    match = re.search(r"&& (run_inference .*)", text)
    if match is None:
        raise ValueError("README.md has no line with `&& run_inference ...`")
    command = f'"{sys.executable}" -m jaxinfer.{match[1]} 2>&1'
    with tempfile.TemporaryDirectory() as empty:
        # Compiled programs are kept under the home directory.
        environment = os.environ | {"HOME": empty, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, shell=True, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return f"```text\n{fold(result.stdout)}\n```"


def fold(output: str) -> str:
    """Lines of at most `_WIDTH` characters, long ones cut after a few; of a progress bar its last state."""
    lines = [line.rstrip().rpartition("\r")[2] for line in output.split("\n")]
    folded = [textwrap.wrap(line, _WIDTH, max_lines=_MOST_LINES, placeholder=" [...]") for line in lines]
    return "\n".join("\n".join(parts) for parts in folded).strip()


TABLES = {"support": support, "plan": plan_cases.example, "plans": plan_cases.table, "kernels": kernels, "speed": speed}


def with_block(text: str, name: str, command: str, block: str) -> str:
    """`text` with `block` between the markers of `name`. Raises ValueError unless they are there once."""
    begin, end = f"<!-- {name}: {command} -->", f"<!-- end of {name} -->"
    pattern = f"({re.escape(begin)}\n).*?({re.escape(end)})"
    text, count = re.subn(pattern, lambda match: f"{match[1]}{block}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md needs {begin} and {end} once, found them {count} times")
    return text


def with_tables(text: str) -> str:
    """`text` with each table between its markers."""
    for name, table in TABLES.items():
        text = with_block(text, name, COMMAND, table())
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="rewrite README.md's tables")
    parser.add_argument("--first_run", action="store_true", help="rewrite README.md's tables and first output")
    options = parser.parse_args()
    text = with_tables(README.read_text(encoding="utf-8"))
    if options.first_run:
        text = with_block(text, "first run", FIRST_RUN_COMMAND, first_run(text))
    if options.update or options.first_run:
        README.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
