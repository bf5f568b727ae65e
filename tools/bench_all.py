"""Runs the benchmarks one after the other and makes a page of what they found.

    python tools/bench_all.py                              # all of them on a CPU: about an hour
    python tools/bench_all.py --only=startup_demo,host
    python tools/bench_all.py --only=                      # the page alone, from the records that are there

Each is a process of its own, whose record goes to FOLDER/NAME_cpu.json; the page is FOLDER/cpu.md, its pictures
FOLDER/cpu_*.svg (pip install -e ".[viz]"). A benchmark that fails keeps its old record, and the exit code is 1.
"""

import json
import pathlib
import subprocess
import sys
from typing import Any

from absl import app, flags

from jaxinfer.tools import bench_page

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_DECODE = "bench_decode --peers=hf,hf_compiled,llama_cpp --peer_threads=0 --new_tokens=32"
BENCHMARKS = {
    "decode_61m": f"{_DECODE} --shape=61m",
    "decode_254m": _DECODE,
    "decode_476m": f"{_DECODE} --shape=476m",
    "context_254m": f"{_DECODE} --prompt_tokens=512",
    "startup_demo": "bench_startup",
    "sampling": "bench_sampling --shape=254m",
    "prefix_61m": "bench_prefix",
    "load_61m": "bench_load --chunk_tokens=64,512",
    "host": "bench_host",
}
_ONLY = flags.DEFINE_list("only", [*BENCHMARKS], "Which are run; empty for none.")
_FOLDER = flags.DEFINE_string("folder", str(_ROOT / "docs" / "benchmarks"), "Of records, page and pictures.")
_MORE = flags.DEFINE_string("more", "", "Flags behind those of each benchmark, as --rounds=3.")


def run(name: str, folder: pathlib.Path) -> bool:
    """Whether it ended well; its record is kept then."""
    program, *arguments = [*BENCHMARKS[name].split(), *_MORE.value.split()]
    print(f"{name}: {program} {' '.join(arguments)}", flush=True)
    command = [sys.executable, str(_ROOT / "tools" / f"{program}.py"), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        print(f"{name}: exit code {result.returncode}", flush=True)
        return False
    *told, record = result.stdout.splitlines()
    print(*(f"  {line}" for line in told), sep="\n", flush=True)
    (folder / f"{name}_cpu.json").write_text(json.dumps(json.loads(record), indent=1) + "\n", encoding="utf-8")
    return True


def records(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Those that are there, by name."""
    paths = {name: folder / f"{name}_cpu.json" for name in BENCHMARKS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def main(argv: list[str]) -> int:
    del argv
    folder = pathlib.Path(_FOLDER.value)
    if unknown := sorted({*_ONLY.value} - {*BENCHMARKS}):
        raise app.UsageError(f"--only={','.join(_ONLY.value)}: unknown {unknown}; known: {', '.join(BENCHMARKS)}")
    failed = [name for name in _ONLY.value if not run(name, folder)]
    bench_page.write(folder, records(folder))
    return bool(failed)


if __name__ == "__main__":
    app.run(main)
