"""Plans for the published models of tests/published_configs, and for one that is as large as GLM-130B."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from jaxinfer.engine_config import EngineConfig
from jaxinfer.parameters import model_weights
from jaxinfer.planning.candidates import Candidate, Planner, Rejection
from jaxinfer.planning.clusters import Efficiency, gpu_cluster, parse_devices
from jaxinfer.planning.workload import Workload
from jaxinfer.tools.plan_cases import MEM_FRACTION
from tests import published


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
