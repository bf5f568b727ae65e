"""From what a user asks to a `Planner`: the model's numbers read, the cluster described, every "auto" decided."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxinfer import models
from jaxinfer.config import EncoderConfig, ModelConfig
from jaxinfer.engine_config import EngineConfig
from jaxinfer.hf_config import QUANTIZATION_KEY, HFConfig
from jaxinfer.layouts import parse_mesh
from jaxinfer.model_files import read_json_object
from jaxinfer.parameters import model_weights
from jaxinfer.planning.candidates import Planner
from jaxinfer.planning.clusters import CPU, Cluster, Efficiency, gpu_cluster, parse_devices
from jaxinfer.planning.workload import DEFAULT_CHUNK, Workload
from jaxinfer.resolve import DEMO_MODEL, find_model_dir

_PACKED_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.5}


def cluster(
    text: str,
    *,
    devices_per_node: int | None = None,
    link_gb_s: float | None = None,
    network_gb_s: float | None = None,
    link_latency_s: float | None = None,
    network_latency_s: float | None = None,
) -> Cluster:
    """That `--devices` spells, with the links that are given in place of the usual. Raises ValueError."""
    name, num_nodes, count = parse_devices(text, devices_per_node=devices_per_node)
    links = {"link": (link_gb_s, link_latency_s), "network": (network_gb_s, network_latency_s)}
    if name == CPU:
        from jaxinfer.planning.calibration import cpu_cluster

        for field, values in links.items():
            for flag, value in zip((f"{field}_gb_s", f"{field}_latency_s"), values, strict=True):
                if value is not None:
                    raise ValueError(f"--{flag}={value}: --devices={text} has no links that could be chosen")
        return cpu_cluster(num_nodes * count)
    found = gpu_cluster(name, num_nodes, count, Efficiency())
    for field, (gb_s, latency_s) in links.items():
        for flag, value in ((f"{field}_gb_s", gb_s), (f"{field}_latency_s", latency_s)):
            if value is not None and not value > 0:
                raise ValueError(f"--{flag}={value}: must be above 0")
        link = getattr(found, field)
        if gb_s is not None:
            link = dataclasses.replace(link, bytes_per_s=1e9 * gb_s, name=f"a {field}")
        if latency_s is not None:
            link = dataclasses.replace(link, latency_s=latency_s)
        found = dataclasses.replace(found, **{field: link})
    return found


def planner(
    model: ModelConfig,
    asked: Mapping[str, Any],
    cluster: Cluster,
    workload: Workload,
    *,
    weight_dtype: str = "auto",
    mem_fraction: float | None = None,
) -> Planner:
    """For a decoder.

    `asked` are the fields of EngineConfig that the user chose, `mem_fraction` what JAX gets of a GPU's memory. Raises
    ValueError for what no mesh could change.
    """
    wanted: dict[str, Any] = {
        "max_model_len": workload.num_tokens,
        "max_num_batched_tokens": DEFAULT_CHUNK[cluster.platform],
        **asked,
    }
    engine = EngineConfig(**wanted)
    assert engine.max_model_len is not None
    if engine.expert_placement is not None and not engine.mesh:
        raise ValueError(f"--expert_placement={engine.expert_placement}: is for one mesh; give it as --mesh")
    if (needed := math.prod(parse_mesh(engine.mesh).values())) > cluster.num_devices:
        raise ValueError(f"--mesh={engine.mesh} needs {needed} devices, and --devices has {cluster.num_devices}")
    if engine.max_model_len > model.max_position:
        raise ValueError(
            f"{engine.max_model_len} tokens are beyond the {model.max_position} positions that the model was made for "
            f"(max_position_embeddings); use smaller --prompt_tokens, --output_tokens or --max_model_len"
        )
    if engine.max_model_len < workload.num_tokens:
        raise ValueError(
            f"--max_model_len={engine.max_model_len} is less than the {workload.num_tokens} tokens of a request "
            f"(--prompt_tokens={workload.prompt_tokens} --output_tokens={workload.output_tokens})"
        )
    if mem_fraction is not None and not 0 < mem_fraction <= 1:
        raise ValueError(f"--mem_fraction={mem_fraction}: must be above 0 and at most 1")
    dtype = jnp.dtype(
        ("float32" if cluster.platform == "cpu" else "bfloat16") if engine.dtype == "auto" else engine.dtype
    )
    if dtype == jnp.float32:
        cluster = cluster.in_float32()
    weights = model_weights(model, dtype)
    if weight_dtype != "auto":
        weights = weights.packed(_PACKED_BYTES[weight_dtype])
    return Planner(
        config=engine,
        model=model,
        weights=weights,
        dtype=dtype,
        cluster=cluster,
        free_bytes=int((mem_fraction or 1.0) * cluster.memory_bytes),
        workload=workload,
        num_seqs=asked.get("max_num_seqs"),
    )


def read_model_config(model: str | None, weight_dtype: str = "auto") -> ModelConfig:
    """Of a model directory or of a config.json alone; None: the demonstration model. ValueError for no decoder.

    With a `weight_dtype` it does not matter how the file says that weights are packed, nor what else would load them.
    """
    path = pathlib.Path(model or DEMO_MODEL).expanduser()
    hf = HFConfig(read_json_object(path), str(path)) if path.is_file() else HFConfig.read(find_model_dir(model))
    if weight_dtype != "auto":
        hf = hf.without(QUANTIZATION_KEY, "auto_map")
    try:
        config = models.for_architecture(hf.architecture).parse_config(hf)
    except ValueError as error:
        hint = "; --weight_dtype plans for packed weights" if QUANTIZATION_KEY in str(error) else ""
        raise ValueError(f"{error}{hint}") from None
    if isinstance(config, EncoderConfig):
        raise ValueError(f"{hf.architecture} is an encoder, without a cache to plan for; it runs on data and tensor")
    return config
