"""The programs that an engine would run on a planned mesh, for XLA to compile."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.batch import Buckets, StepShape
from jaxinfer.config import ModelConfig
from jaxinfer.decoder_plan import with_experts
from jaxinfer.kv_cache import cache_spec
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.planning import target
from jaxinfer.planning.candidates import Candidate, Planner
from jaxinfer.planning.clusters import Cluster
from jaxinfer.planning.hardware import GPUS
from jaxinfer.planning.layer_kinds import few_layers
from jaxinfer.step_programs import StepPrograms
from sharding_rules import axes as ax


class PlannedPrograms(NamedTuple):
    """What `compiled.compile_step` takes.

    Attributes:
      programs: of the whole model or of a few layers.
      counts: of each of its slots for layers, how many of the model's it stands for.
    """

    programs: StepPrograms
    counts: tuple[int, ...]


def devices_of(cluster: Cluster, num_devices: int) -> list[jax.Device]:
    """So many devices of a cluster, to compile for: GPUs that are not there, or else this machine's CPU devices."""
    if cluster.name not in GPUS or target.missing():
        return jax.devices("cpu")[:num_devices]
    most = cluster.devices_per_node
    each = num_devices if num_devices <= most else math.gcd(num_devices, most)  # nodes have equally many
    return target.devices(GPUS[cluster.name], each, num_devices // each)


def planned_programs(
    planner: Planner, candidate: Candidate, devices: list[jax.Device], *, all_layers: bool = False
) -> PlannedPrograms:
    """Of an engine as it is planned, on `devices`. CPUs in place of GPUs have the kernels that are for any device."""
    config, plan = candidate.config, candidate.plan
    attention = plan.attention.name
    if devices[0].platform != planner.cluster.platform:
        config, attention = dataclasses.replace(config, moe_backend="auto"), "xla"
    partitioner = Partitioner.create(config.mesh, config.sharding, devices)
    model, _ = with_experts(planner.model, config, partitioner, devices[0])
    assert isinstance(model, ModelConfig)
    few = few_layers(model, partitioner.axis_size(ax.STAGE), all_layers=all_layers)
    definition = ModelDefinition.create(few.config, partitioner, planner.dtype)
    cache = cache_spec(
        few.config,
        partitioner,
        pages_per_shard=plan.memory.pages_per_shard,
        page_size=plan.page_size,
        dtype=jnp.dtype(config.cache_dtype or planner.dtype),
    )
    programs = StepPrograms(
        definition=definition,
        cache_spec=cache,
        buckets=plan.buckets,
        backend=attention,
        counts_experts=config.expert_counts,
    )
    return PlannedPrograms(programs, few.counts)


def widest_shapes(buckets: Buckets) -> dict[str, StepShape]:
    """The largest step that decodes, for each of its rows as many tokens as it can, and the largest that prefills."""
    shapes = buckets.shapes()
    return {
        "decode": max(shape for shape in shapes if not shape.chunk_tokens),
        "prefill": max(shape for shape in shapes if shape.chunk_tokens),
    }
