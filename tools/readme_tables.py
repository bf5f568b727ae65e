"""Writes the README's tables: what works, from the code that makes it work, and how fast, from docs/benchmarks.

python tools/readme_tables.py            # prints the README as it should be
python tools/readme_tables.py --update   # puts the tables between its markers
"""

import json
import pathlib
import re
import sys

import sharding_rules
from jaxinfer import models
from pallas_kernels import paged_attention

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
COMMAND = "python tools/readme_tables.py --update"

_MESHES = {
    "replicated": "one device",
    "data_parallel": "`data:2`, `data:8`",
    "tensor_parallel": "`tensor:2`, `tensor:4`, `tensor:8`",
    "data_and_tensor": "`data:2,tensor:4`",
}


def support() -> str:
    """Markdown: every family, strategy and kernel that the code finds."""
    rows = ["| what | which | shown by |", "|---|---|---|"]
    for name in models.families():
        family = models.get(name)
        configs = ", ".join(config.replace("_", " ") for config in family.TINY_CONFIGS)
        rows.append(f"| model family | {', '.join(family.ARCHITECTURES)} ({configs}) | `tests/parity` |")
    rows += [
        f"| sharding | `{name}`: {_MESHES.get(name, 'no test yet')} | `tests/test_meshes.py` |"
        for name in sharding_rules.strategies()
    ]
    rows += [f"| paged attention | `{name}` | `tests/test_paged_attention.py` |" for name in paged_attention.backends()]
    rows.append("| weights | Hugging Face safetensors, one file or index and shards | `tests/test_hf_reader.py` |")
    rows.append("| sampling | greedy, temperature, top-k, top-p, seed per request | `tests/test_sampling.py` |")
    rows.append("| engine | `generate`, `stream`, `chat`, `add_request`/`step`/`abort` | `tests/test_engine.py` |")
    return "\n".join(rows)


def speed() -> str:
    """Markdown: every result in docs/benchmarks beside its peer."""
    rows = [
        "| model | device | batch | tokens/s | Hugging Face eager, same run | ratio | of measured bandwidth |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for path in sorted((ROOT / "docs" / "benchmarks").glob("decode_*.json")):
        report = json.loads(path.read_text())
        model = f"{report['num_params'] / 1e6:,.0f} M Llama, {report['dtype']}"
        device = f"{report['machine']['cores']} cores, {report['machine']['device']}"
        for result in report["results"]:
            peer, ratio = result.get("peer_tokens_per_s"), result.get("ratio")
            rows.append(
                f"| {model} | {device} | {result['batch_size']} | {result['tokens_per_s']:.0f} "
                f"| {'' if peer is None else f'{peer:.0f}'} | {'' if ratio is None else f'{ratio:.2f}'} "
                f"| {result['bandwidth_share']:.0%} |"
            )
    return "\n".join(rows)


TABLES = {"support": support, "speed": speed}


def with_tables(text: str) -> str:
    """`text` with each table between its markers. Raises ValueError for a table that has no markers."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: {COMMAND} -->", f"<!-- end of {name} -->"
        text, count = re.subn(
            f"({re.escape(begin)}\n).*?({re.escape(end)})", rf"\g<1>{table()}\n\g<2>", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"README.md needs {begin} and {end} once, found them {count} times")
    return text


if __name__ == "__main__":
    updated = with_tables(README.read_text())
    if sys.argv[1:] == ["--update"]:
        README.write_text(updated)
    else:
        print(updated)
