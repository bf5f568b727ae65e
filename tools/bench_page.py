"""The page of the benchmarks' records: what was run, on which machine, and what came out, with pictures."""

import pathlib
from collections.abc import Callable
from typing import Any

from jaxinfer.planning.plots import STYLE

Record = dict[str, Any]
_PEERS = {"hf": "Hugging Face eager", "hf_compiled": "torch.compile", "llama_cpp": "llama.cpp"}
_PHASES = ("interpreter_s", "imports_s", "decisions_s", "weights_s", "programs_s", "first_step_s")
_SIZE = (7.0, 2.6)  # inches


def write(folder: pathlib.Path, records: dict[str, Record]) -> None:
    """FOLDER/cpu.md from the records of `bench_all.BENCHMARKS`, by their names."""
    parts = ["# Benchmarks on a CPU", "Written by `python tools/bench_all.py`."]
    decode = {name: record for name, record in records.items() if name.startswith(("decode", "context"))}
    if decode:
        _plot(folder / "cpu_decode.svg", lambda axes: _draw_shares(axes, decode))
        parts += ["## Decoding", _DECODING, "![share of the bandwidth](cpu_decode.svg)", _decode_table(decode)]
    if startup := records.get("startup_demo"):
        _plot(folder / "cpu_startup.svg", lambda axes: _draw_phases(axes, startup["results"]))
        parts += ["## Start-up", _startup_text(startup["results"]), "![phases of a second start](cpu_startup.svg)"]
    if sampling := records.get("sampling"):
        parts += ["## Drawing tokens", _sampling_table(sampling["results"])]
    if prefix := records.get("prefix_61m"):
        parts += ["## Shared prefixes", _prefix_text(prefix)]
    if load := records.get("load_61m"):
        parts += ["## The first token under load", _load_text(load)]
    parts += ["## Commands and machines", _command_table(records)]
    (folder / "cpu.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


_DECODING = (
    "`x` is how many times as fast jaxinfer is as a peer: the median of the ratios of alternating rounds, with the\n"
    "same weights, prompts and precision. The share is of what the process reads from memory with nothing else to do."
)


def _decode_table(records: dict[str, Record]) -> str:
    rows = []
    for record in records.values():
        for result in record["results"]:
            cells = [f"{record['num_params'] / 1e6:.0f} M", result["batch_size"], result.get("prompt_tokens", "")]
            cells += [f"{result['tokens_per_s']:.0f}", f"{result['bandwidth_share']:.0%}"]
            cells += [f"{result[peer]['decode_ratio']:.2f}" if peer in result else "" for peer in _PEERS]
            cells += [f"{result['hf']['prefill_ratio']:.2f}" if "hf" in result else ""]
            rows.append(cells)
    heads = ["parameters", "batch", "prompt", "tokens/s", "of bandwidth", *(f"x {peer}" for peer in _PEERS.values())]
    return _table([*heads, "prefill x Hugging Face"], rows)


def _draw_shares(axes: Any, records: dict[str, Record]) -> None:
    for name, record in records.items():
        of_one = [result for result in record["results"] if result["batch_size"] == 1]
        for result in of_one:
            label = f"{name}\nprompt {result['prompt_tokens']}" if len(of_one) > 1 else name
            axes.bar(label, 100 * result["bandwidth_share"], color="tab:blue")
    axes.axhline(80, color="gray", linewidth=0.8)
    axes.set_ylabel("% of bandwidth, batch 1")


def _startup_text(results: Record) -> str:
    told = f"From the command to its first text: {results['first_s']:.1f} s with no compiled programs on disk, "
    told += f"{results['second_s']:.1f} s with them"
    told += f"; Hugging Face transformers {results['hf_s']:.1f} s." if "hf_s" in results else "."
    phases = results["phases"]
    counts = ", ".join(f"{phases[name]:.0f} {name}" for name in ("traced", "lowered", "compiled"))
    return f"{told} In a second start of `Engine` JAX had {counts}."


def _draw_phases(axes: Any, results: Record) -> None:
    left = 0.0
    for name in _PHASES:
        seconds = results["phases"][name]
        axes.barh("second start", seconds, left=left, label=name.removesuffix("_s").replace("_", " "))
        left += seconds
    axes.set_xlabel("seconds")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.6), frameon=False)


def _sampling_table(results: list[Record]) -> str:
    ways = [result for result in results if "way" in result]
    peers = [key.removesuffix("_ratio") for key in ways[0] if key.endswith("_ratio")]
    rows = []
    for result in ways:
        cells = [result["batch_size"], result["logits"], result["way"], f"{1e3 * result['ours_s']:.2f}"]
        rows.append(cells + [f"{result[f'{peer}_ratio']:.1f}" for peer in peers])
    table = _table(["rows", "logits", "way", "ms", *(f"x {peer}" for peer in peers)], rows)
    steps = [f"{r['sampling_share']:.1%} of a step of {r['batch_size']} rows" for r in results if "step_s" in r]
    return table + (f"\n\nDrawing within top-p takes {', '.join(steps)}." if steps else "")


def _prefix_text(record: Record) -> str:
    results = record["results"]
    rows = [[f"{r['shared']:.0%} shared", f"{r['ratio']:.2f}"] for r in results["throughput"]]
    rows.append([f"{record['turns']} turns", f"{results['turns']['ratio']:.2f}"])
    hit = results["first_token"]["ratio"]
    told = f"The first token of a prompt that was asked before takes {hit:.2f} of the time that a new one takes."
    return f"{_table(['prompts', 'x without the prefix cache'], rows)}\n\n{told}"


def _load_text(record: Record) -> str:
    names = ("idle_s", "loaded_s", "gap_s", "quiet_gap_s")
    rows = []
    for result in record["results"]:
        seconds = [f"{result[name]:.3f}" for name in names]
        rows.append([result["chunk_tokens"], *seconds[:2], f"{result['ratio']:.2f}", *seconds[2:]])
    heads = [
        "tokens of a step",
        "idle, s",
        "beside rows that decode, s",
        "ratio",
        "longest gap of a row, s",
        "alone, s",
    ]
    told = f"Prompts of {record['prompt_tokens']} tokens, {record['batch_size']} slots of which all others decode."
    return f"{told}\n\n{_table(heads, rows)}"


def _command_table(records: dict[str, Record]) -> str:
    rows = []
    for name, record in records.items():
        versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        machine = record["machine"]
        where = f"{machine['cores']} cores, {machine['cpu']}"
        rows.append(
            [
                f"`{name}_cpu.json`",
                f"`{record['command']}`",
                where,
                versions,
                record["commit"][:9] + record["commit"][40:],
            ]
        )
    return _table(["record", "command", "machine", "versions", "commit"], rows)


def _table(heads: list[str], rows: list[list[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _plot(path: pathlib.Path, draw: Callable[[Any], None]) -> None:
    """The same records give the same file."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(path, metadata={"Date": None})
