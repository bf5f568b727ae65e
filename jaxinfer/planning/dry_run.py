"""What an engine would take of the devices that are here, and how fast it would be: nothing is loaded or compiled."""

import dataclasses
from typing import Any

from jaxinfer.engine_config import EngineConfig
from jaxinfer.planning import plan, report
from jaxinfer.planning.candidates import Candidate
from jaxinfer.planning.clusters import CPU, Cluster
from jaxinfer.planning.hardware import GPUS
from jaxinfer.planning.workload import Workload
from jaxinfer.resolve import ResolvedEncoder, ResolvedEngine, resolve


def describe(config: EngineConfig, given: dict[str, Any], output_tokens: int) -> str:
    """Lines for the user. `given` are the fields that were chosen. Raises ValueError for what would not run."""
    resolved = resolve(config)
    lines = [resolved.summary, f"programs to compile: {len(resolved.buckets.shapes())}"]
    if isinstance(resolved, ResolvedEncoder):
        return "\n".join(lines)
    kind, free_bytes = resolved.definition.partitioner.device_kind, resolved.memory.free_bytes
    if free_bytes is None:
        return "\n".join([*lines, f"a {kind} does not say how much memory is free"])
    cluster = _cluster(resolved)
    if cluster is None:
        return "\n".join([*lines, f"nothing is known of the speed of a {kind}"])
    output_tokens = min(output_tokens, resolved.max_model_len - 1)
    workload = Workload(prompt_tokens=resolved.max_model_len - output_tokens, output_tokens=output_tokens)
    asked = given | {"max_model_len": resolved.max_model_len, "max_num_seqs": config.max_num_seqs}
    asked |= {"mesh": config.mesh, "max_num_batched_tokens": config.max_num_batched_tokens}
    asked.pop("model", None)
    planner = dataclasses.replace(
        plan.planner(resolved.definition.decoder_config, asked, cluster, workload), free_bytes=free_bytes
    )
    found = planner.candidate(config.mesh, config.sharding)
    if not isinstance(found, Candidate):
        raise ValueError(found.reason)
    of_requests = f"requests of {workload.prompt_tokens} + {workload.output_tokens} tokens:"
    return "\n".join([*lines, "", of_requests, report.table([found]), report.assumptions(cluster)])


def _cluster(resolved: ResolvedEngine) -> Cluster | None:
    """Of the mesh's devices, all on this machine; None where they are no known ones."""
    partitioner = resolved.definition.partitioner
    names = [name for name, gpu in GPUS.items() if gpu.device_kind == partitioner.device_kind]
    if partitioner.platform == CPU:
        names = [CPU]
    return plan.cluster(f"{names[0]}:1x{partitioner.num_devices}") if names else None
