"""A plan in words: what was asked, the meshes that can be and those that cannot, and how to run one."""

import dataclasses
import shlex
from collections.abc import Iterable, Sequence

from jaxinfer.engine_config import EngineConfig
from jaxinfer.planner import format_bytes
from jaxinfer.planning.bars import memory_bars, step_bars
from jaxinfer.planning.candidates import Candidate, Planner, Rejection, ranked
from jaxinfer.planning.clusters import Cluster

_PLANNED = ("mesh", "sharding", "dtype", "kv_cache_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens")


def text(planner: Planner, found: Sequence[Candidate | Rejection], top: int, mem_fraction: float | None) -> str:
    """The best `top` meshes and as many that cannot be, those first that lack the least. `mem_fraction`: see below."""
    best = ranked([each for each in found if isinstance(each, Candidate)], planner.workload.objective)
    rejected = [each for each in found if isinstance(each, Rejection)]
    parts = [heading(planner, mem_fraction)]
    if best:
        parts.append(table(best[:top]))
    if rejected:
        parts.append(f"{len(rejected)} of {len(found)} meshes cannot be:\n{rejections(rejected, top)}")
    if best:
        parts.append(assumptions(planner.cluster))
    return "\n\n".join(parts)


def to_run(first: Candidate, model: str | None, mem_fraction: float | None) -> str:
    """The command for the best, announced."""
    return f"to run the first:\n{command(first, model, mem_fraction)}"


def heading(planner: Planner, mem_fraction: float | None) -> str:
    """The model, the devices, the requests. `mem_fraction` is what JAX gets of a GPU's memory."""
    weights, cluster, asked = planner.weights, planner.cluster, planner.workload
    of_device = f"{format_bytes(planner.free_bytes)} of each for the engine"
    if mem_fraction is not None:
        of_device += f" ({_mem_fraction(mem_fraction)})"
    limits = [f"--{name}={value:g}" for name in ("qps", "ttft_s", "tpot_s") if (value := getattr(asked, name))]
    return "\n".join(
        [
            f"{planner.model.family}: {_count(weights.num_params)} parameters, "
            f"{format_bytes(weights.num_bytes)} of weights, computed in {planner.dtype.name}",
            f"{cluster}; {of_device}, which uses --memory_fraction={planner.config.memory_fraction:g} of it",
            f"requests of {asked.prompt_tokens} + {asked.output_tokens} tokens in a cache for "
            f"{planner.config.max_model_len}; best {asked.objective} first"
            + (f", within {' '.join(limits)}" if limits else ""),
        ]
    )


def table(candidates: Sequence[Candidate]) -> str:
    """A row for each. Bytes are those of a device; times are of the whole mesh."""
    rows = [
        [
            "",
            "mesh",
            "weights",
            "workspace",
            "cache",
            "a token",
            "seqs",
            "TTFT",
            "TPOT",
            "tokens/s",
            "a device",
            "decoding is",
        ]
    ]
    for rank, candidate in enumerate(candidates, 1):
        memory, performance = candidate.plan.memory, candidate.performance
        sizes = (memory.weights_bytes, memory.workspace_bytes, memory.cache_bytes, memory.page_bytes / memory.page_size)
        rows.append(
            [
                str(rank),
                candidate.mesh,
                *map(format_bytes, sizes),
                str(performance.num_seqs),
                format_seconds(performance.ttft_s),
                format_seconds(performance.tpot_s),
                f"{performance.tokens_per_s:,.0f}",
                f"{performance.tokens_per_s / candidate.num_devices:,.0f}",
                performance.decode.bound,
            ]
        )
    return aligned(rows, left=(1, len(rows[0]) - 1))


def bars(candidates: Sequence[Candidate]) -> str:
    """Memory of a device and time of a step that decodes, as bars of characters, for each mesh."""
    memory = {candidate.mesh: candidate.memory_parts for candidate in candidates}
    steps = {candidate.mesh: candidate.performance.decode for candidate in candidates}
    return f"{memory_bars(memory)}\n\n{step_bars(steps)}"


def rejections(rejected: Sequence[Rejection], most: int) -> str:
    """A line for each of so many meshes, and for the rest one."""
    nearest = rejected
    if len(rejected) > most:
        by_distance = lambda r: (not r.is_too_slow, r.excess_bytes is None, r.excess_bytes or 0)  # noqa: E731
        nearest = sorted(rejected, key=by_distance)[:most]
    lines = aligned([["", rejection.mesh, rejection.reason] for rejection in nearest], left=(1, 2))
    more = len(rejected) - len(nearest)
    return f"{lines}\n  and {more} more (--top={len(rejected)} shows all)" if more else lines


def assumptions(cluster: Cluster) -> str:
    """What times are computed with."""
    rates = cluster.rates
    text = (
        f"times are computed, not measured: {rates.bytes_per_s / 1e9:,.0f} GB/s of weights, "
        f"{rates.attention_bytes_per_s / 1e9:,.0f} of cache; {rates.flops_at(2**20) / 1e12:,.3g} TFLOP/s in products, "
        f"{rates.attention_flops / 1e12:,.3g} in attention;\nall rows draw within top-p, "
        f"{rates.logits_per_s / 1e9:,.3g} billion logits/s; {rates.layer_s * 1e6:.0f} us a layer and "
        f"{rates.step_s * 1e6:.0f} us a step beside that"
    )
    links = [cluster.link] * (cluster.devices_per_node > 1) + [cluster.network] * (cluster.num_nodes > 1)
    return text + "".join(
        f", {link.name} at {link.bytes_per_s / 1e9:,.3g} GB/s and {link.latency_s * 1e6:.0f} us" for link in links
    )


def command(candidate: Candidate, model: str | None, mem_fraction: float | None) -> str:
    """That runs the plan, ready to paste; of several nodes on each of them. No `model` is the demonstration model."""
    config, defaults, cluster = candidate.config, EngineConfig(), candidate.model.cluster
    values = {name: getattr(config, name) for name in (*_PLANNED, *_others(config, defaults))}
    flags = [] if model is None else [f"--model={shlex.quote(model)}"]
    flags += [f"--{name}={value}" for name, value in values.items() if value != getattr(defaults, name)]
    if cluster.platform == "cpu" and candidate.num_devices > 1:
        flags.append(f"--num_cpu_devices={candidate.num_devices}")
    num_nodes = -(-candidate.num_devices // cluster.devices_per_node)
    if num_nodes > 1:
        flags += ["--coordinator_address=HOST:PORT", f"--num_processes={num_nodes}", "--process_id=ID"]
    before = f"{_mem_fraction(mem_fraction)} " if mem_fraction is not None else ""
    return f"{before}run_inference " + " ".join(flags)


def _others(config: EngineConfig, defaults: EngineConfig) -> list[str]:
    """Fields that the user chose beside those that are planned."""
    names = [field.name for field in dataclasses.fields(EngineConfig) if field.name not in (*_PLANNED, "model")]
    return [name for name in names if getattr(config, name) != getattr(defaults, name)]


def _mem_fraction(fraction: float) -> str:
    return f"XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:g}"


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def format_seconds(seconds: float) -> str:
    """As "1.25 s" or "9.1 ms"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def aligned(rows: Sequence[Sequence[str]], left: Iterable[int]) -> str:
    """Columns of text, those of `left` to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = set(left)
    lines = (
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
