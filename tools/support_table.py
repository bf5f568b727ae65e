"""Writes the README's table of what works, from the code that makes it work.

python tools/support_table.py            # prints it
python tools/support_table.py --update   # puts it between the README's markers
"""

import pathlib
import re
import sys

import sharding_rules
from jaxinfer import models
from pallas_kernels import paged_attention

README = pathlib.Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- support table: python tools/support_table.py --update -->", "<!-- end -->"

_MESHES = {
    "replicated": "one device",
    "data_parallel": "`data:2`, `data:8`",
    "tensor_parallel": "`tensor:2`, `tensor:4`, `tensor:8`",
    "data_and_tensor": "`data:2,tensor:4`",
}


def table() -> str:
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


def with_table(text: str) -> str:
    """`text` with the table between the markers."""
    return re.sub(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", rf"\g<1>{table()}\n\g<2>", text, flags=re.DOTALL)


if __name__ == "__main__":
    if sys.argv[1:] == ["--update"]:
        README.write_text(with_table(README.read_text()))
    else:
        print(table())
