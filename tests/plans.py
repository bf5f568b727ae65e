"""Plans for the published models of tests/published_configs, and for one that is as large as GLM-130B."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from jaxinfer.engine_config import EngineConfig
from jaxinfer.parameters import model_weights
from jaxinfer.planning.candidates import Candidate, Planner, Rejection
from jaxinfer.planning.clusters import Efficiency, Rates, gpu_cluster, parse_devices
from jaxinfer.planning.workload import Workload
from jaxinfer.tools.plan_cases import MEM_FRACTION
from tests import published

CPU_RATES = Rates(  # of no machine
    bytes_per_s=20e9,
    flops=((1, 10e9), (8, 60e9), (32, 100e9)),
    attention_bytes_per_s=5e9,
    attention_flops=25e9,
    logits_per_s=1e7,
    layer_s=2e-4,
    token_s=1e-6,
    step_s=5e-4,
)


def planner(
    name: str,
    devices: str,
    *,
    dtype: str = "bfloat16",
    itemsize: float | None = None,
    model: dict[str, Any] | None = None,
    flags: dict[str, Any] | None = None,
    num_seqs: int | None = None,
    **asked: Any,
) -> Planner:
    """For requests that are `asked`, of a model with `model` changed and `itemsize` bytes for a weight."""
    config = _changed(name, **(model or {}))
    workload = Workload(**asked)
    weights = model_weights(config, jnp.dtype(dtype))
    cluster = gpu_cluster(*parse_devices(devices), Efficiency())
    settings = {"max_model_len": workload.num_tokens, "max_num_batched_tokens": 2048, **(flags or {})}
    return Planner(
        config=EngineConfig(dtype=dtype, **settings),
        model=config,
        weights=weights if itemsize is None else weights.packed(itemsize),
        dtype=jnp.dtype(dtype),
        cluster=cluster,
        free_bytes=int(MEM_FRACTION * cluster.memory_bytes),
        workload=workload,
        num_seqs=num_seqs,
    )


@functools.cache
def _changed(name: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(published.read(name), **changes)


def candidate(found: Candidate | Rejection) -> Candidate:
    assert isinstance(found, Candidate), found
    return found


def reason(found: Candidate | Rejection) -> str:
    assert isinstance(found, Rejection), found.mesh
    return found.reason
