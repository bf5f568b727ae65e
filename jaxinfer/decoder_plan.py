"""What an engine decides about a decoder on a mesh: sizes, kernels, compiled shapes, memory.

For devices that are there, and for those that a plan is about: nothing is asked of a device but what it is.
"""

import dataclasses
import pathlib
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxinfer import batch, expert_placement
from jaxinfer.attention import attention_specs
from jaxinfer.batch import Buckets, StepShape
from jaxinfer.config import EncoderConfig, ModelConfig
from jaxinfer.engine_config import EngineConfig
from jaxinfer.integers import cdiv
from jaxinfer.layouts import AxisSplits
from jaxinfer.memory import Demand
from jaxinfer.planner import MemoryPlan
from pallas_kernels import grouped_matmul, paged_attention
from sharding_rules import axes as ax

MIN_CHUNK = {"cpu": 32, "gpu": 128}  # tokens of the smallest; fewer take a GPU no less time: it waits for the weights
_SLOT_TOKEN, _SLOT_STOPPED = jnp.dtype(jnp.int32), jnp.dtype(jnp.bool_)  # `SlotState`


class Device(Protocol):
    """As much of a `jax.Device` as decides; of a GPU also its `compute_capability`, as "9.0"."""

    @property
    def platform(self) -> str: ...

    @property
    def device_kind(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderPlan:
    """Of one engine.

    Attributes, where the name does not say it:
      slots_per_shard: sequences that decode together in each data shard.
      attention: the backend.
    """

    slots_per_shard: int
    page_size: int
    attention: paged_attention.Choice
    buckets: Buckets
    memory: MemoryPlan

    def argument_bytes(self, shape: StepShape) -> int:
        """That the program of a shape takes on one device: weights, cache, each slot's last token, and the batch."""
        of_slots = self.slots_per_shard * (_SLOT_TOKEN.itemsize + _SLOT_STOPPED.itemsize)
        arrays = jax.tree.leaves(batch.empty(shape, self.buckets))
        of_batch = sum(array.nbytes // (self.buckets.num_shards if array.ndim else 1) for array in arrays)
        return self.memory.weights_bytes + self.memory.cache_bytes + of_slots + of_batch


def plan_decoder(
    config: EngineConfig,
    model: ModelConfig,
    splits: AxisSplits,
    *,
    dtype: jnp.dtype,
    weights_bytes: int,
    device: Device,
    free_bytes: int | None,
    advise: bool = True,
) -> DecoderPlan:
    """Decides what `config`, whose `max_model_len` is decided, leaves open.

    `weights_bytes` and `free_bytes` (None: unknown) are those of one device. Raises ValueError for what cannot be; if
    `advise`, for what does not fit with the flags that would.
    """
    assert config.max_model_len is not None
    on_cpu = device.platform == "cpu"
    page_size = config.page_size or (16 if on_cpu else 64)
    slots_per_shard = rows_per_shard(config, splits)
    of_slots = attention_specs(model, splits, page_size, config.cache_dtype)
    specs = dict.fromkeys(dataclasses.replace(spec, dtype=dtype.name) for of in of_slots for spec in of)
    attention = paged_attention.resolve(config.attention_backend, specs, device)
    buckets = Buckets.create(
        max_rows=slots_per_shard,
        max_model_len=config.max_model_len,
        max_chunk=config.max_num_batched_tokens,
        min_chunk=MIN_CHUNK[device.platform],
        page_size=page_size,
        decode_steps=config.decode_steps,
        num_shards=splits.num_shards(ax.BATCH),
    )
    memory = Demand(
        config=config,
        model=model,
        splits=splits,
        platform=device.platform,
        dtype=dtype,
        weights_bytes=weights_bytes,
        page_size=page_size,
        attention=paged_attention.backend(attention.name),
        free_bytes=free_bytes,
    ).plan(advise=advise)
    return DecoderPlan(
        slots_per_shard=slots_per_shard, page_size=page_size, attention=attention, buckets=buckets, memory=memory
    )


def with_experts(
    model: ModelConfig | EncoderConfig, config: EngineConfig, splits: AxisSplits, device: Device
) -> tuple[ModelConfig | EncoderConfig, grouped_matmul.Choice | None]:
    """The model with its experts where and as the user wants them. Refuses what is asked of experts that are not there.

    Raises ValueError where the backend that is asked for cannot.
    """
    if isinstance(model, EncoderConfig) or (moe := model.moe) is None:
        for name in ("expert_placement", "expert_counts", "moe_backend"):
            if (value := getattr(config, name)) != getattr(EngineConfig, name):
                raise ValueError(f"--{name}={value}: {model.family} has no experts here; leave it out")
        return model, None
    if config.expert_placement is not None:
        path, num_devices = pathlib.Path(config.expert_placement).expanduser(), splits.num_shards(ax.EXPERTS)
        moe = dataclasses.replace(moe, placements=expert_placement.read(path, model, num_devices))
    smallest_size = min(model.embed_dim, moe.mlp_dim // splits.num_shards(ax.EXPERT_MLP))
    choice = grouped_matmul.resolve(config.moe_backend, [smallest_size], device)
    return dataclasses.replace(model, moe=dataclasses.replace(moe, backend=choice.name)), choice


def rows_per_shard(config: EngineConfig, splits: AxisSplits) -> int:
    """Of `max_num_seqs`. Raises ValueError where the data shards cannot have equally many."""
    num_shards = splits.num_shards(ax.BATCH)
    if config.max_num_seqs % num_shards:
        raise ValueError(
            f"--max_num_seqs={config.max_num_seqs} does not divide over {splits.split_text(ax.BATCH)}; "
            f"use {cdiv(config.max_num_seqs, num_shards) * num_shards}"
        )
    return config.max_num_seqs // num_shards
