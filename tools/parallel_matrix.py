"""Runs every family split in every way and scheduled in every way, and compares each token with one device.

python tools/parallel_matrix.py --record=docs/parallel_matrix.json --table=docs/parallel_matrix.md

Families are their tiny configs with random weights. On eight virtual CPU devices; what is in the record already is not
run again. The table is written from the record. Exit code 1 if a combination failed.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

AXES = ("data", "stage", "expert", "context", "tensor")
TRIPLES = (
    ("data", "stage", "tensor"),
    ("data", "expert", "tensor"),
    ("data", "context", "tensor"),
    ("stage", "expert", "tensor"),
    ("stage", "context", "tensor"),
    ("expert", "context", "tensor"),
)
FEATURES = ("chunked prefill", "prefix cache", "preemption", "several steps per dispatch")
EQUAL, REFUSED, FAILED = "equal", "refused", "failed"


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is split: the spelling of `--mesh` and `--sharding`."""

    mesh: str
    sharding: str = "auto"

    def __str__(self) -> str:
        strategy = "" if self.sharding == "auto" else f" {self.sharding}"
        return f"{self.mesh or 'one device'}{strategy}"


def ways() -> list[Way]:
    """One device, each axis, each pair, and chosen triples, all by two; those of experts by both strategies."""
    combinations = [*itertools.chain.from_iterable(itertools.combinations(AXES, n) for n in (1, 2)), *TRIPLES]
    meshes = [",".join(f"{axis}:2" for axis in axes) for axes in combinations]
    return [Way(""), *map(Way, meshes), *(Way(mesh, "expert_sums") for mesh in meshes if "expert" in mesh)]


def key(family: str, way: Way, feature: str) -> str:
    return f"{family} | {way} | {feature}"


def table(record: dict[str, dict[str, str]], families: list[str]) -> str:
    """Markdown: a row for each way, a column for each family, and in it how many of the features gave equal tokens."""
    notes: dict[str, int] = {}
    rows = [f"| mesh | {' | '.join(families)} |", f"|---|{'--:|' * len(families)}"]
    for way in ways():
        cells = []
        for family in families:
            found = [record.get(key(family, way, feature)) for feature in FEATURES]
            outcomes = Counter(entry["outcome"] if entry else "not run" for entry in found)
            if outcomes[REFUSED]:
                reasons = [entry["reason"] for entry in found if entry and entry["outcome"] == REFUSED]
                cells.append(f"no [{notes.setdefault(reasons[0], len(notes) + 1)}]")
            elif outcomes["not run"] == len(FEATURES):
                cells.append("")
            else:
                cells.append(f"{outcomes[EQUAL]}/{len(FEATURES)}")
        rows.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n" + "".join(f"\n[{n}] {reason}\n" for reason, n in notes.items())


def counts(record: dict[str, dict[str, str]]) -> str:
    """Of its outcomes, in words."""
    of = Counter(entry["outcome"] for entry in record.values())
    return f"{of.total()} combinations, {of[EQUAL]} equal, {of[REFUSED]} refused, {of[FAILED]} failed"


def document(record: dict[str, dict[str, str]], families: list[str]) -> str:
    return (
        "# Every way to split every family\n\n"
        "Written by tools/parallel_matrix.py, which runs a tiny model of each family on eight virtual devices. A cell\n"
        f"says with how many of {', '.join(FEATURES)} all greedy\n"
        f"tokens were those of one device, each request by itself.\n\n{counts(record)}\n\n{table(record, families)}"
    )


def read_record(path: pathlib.Path) -> dict[str, dict[str, str]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run_family(family: str, chosen: Iterable[Way], done: dict[str, dict[str, str]]) -> Iterator[dict[str, str]]:
    """The outcomes of what is not done yet. Imports jax."""
    from jaxinfer.tools import parallel_runs

    todo = [way for way in chosen if not all(key(family, way, feature) in done for feature in FEATURES)]
    if todo:
        runs = parallel_runs.FamilyRuns(family)
        for way in todo:
            for feature, (outcome, reason) in runs.outcomes(way.mesh, way.sharding).items():
                yield {"key": key(family, way, feature), "outcome": outcome, "reason": reason}


def set_up() -> None:
    """Eight devices. Machine code that is not optimised is compiled in half the time, and computes the same."""
    from jaxinfer.devices import prefer_cpu, set_num_cpu_devices

    prefer_cpu()
    set_num_cpu_devices(8)
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=pathlib.Path, help="JSON file of outcomes, read and extended")
    parser.add_argument("--table", type=pathlib.Path, help="Markdown file to write")
    parser.add_argument("--families", help="names, with commas; all by default")
    parser.add_argument("--meshes", help="spellings of --mesh, with spaces; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="families at once")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_up()
    from jaxinfer import models

    families = options.families.split(",") if options.families else models.decoders()
    chosen = [way for way in ways() if options.meshes is None or way.mesh in options.meshes.split()]
    record = read_record(options.record) if options.record else {}
    if options.worker:
        for entry in run_family(families[0], chosen, record):
            print(json.dumps(entry), flush=True)
        return 0
    run_all(families, options, record)
    text = document(record, models.decoders())
    if options.table:
        options.table.write_text(text, encoding="utf-8")
    else:
        print(text)
    return int(any(entry["outcome"] == FAILED for entry in record.values()))


def run_all(families: list[str], options: argparse.Namespace, record: dict[str, dict[str, str]]) -> None:
    """A process for each family, a few at once: compiled programs are many, and stay in memory."""
    lock = threading.Lock()

    def run(family: str) -> None:
        command = [sys.executable, __file__, "--worker", f"--families={family}"]
        command += [f"--record={options.record}"] if options.record else []
        command += [f"--meshes={options.meshes}"] if options.meshes is not None else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                entry = json.loads(line)
                with lock:
                    record[entry.pop("key")] = entry
                    if options.record:
                        options.record.write_text(json.dumps(record, indent=0, sort_keys=True) + "\n", encoding="utf-8")
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, families))


if __name__ == "__main__":
    sys.exit(main())
