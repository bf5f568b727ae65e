"""From what the user chose to what will run: the model directory read, every "auto" decided, memory planned.

Nothing is allocated here, and nothing downstream changes what is decided here.
"""

import dataclasses
import pathlib

import jax.numpy as jnp

from jaxinfer import devices, models
from jaxinfer.attention import attention_specs
from jaxinfer.batch import Buckets
from jaxinfer.config import ModelConfig
from jaxinfer.engine_config import EngineConfig
from jaxinfer.generation_config import GenerationDefaults, read_generation_config
from jaxinfer.hf_config import HFConfig
from jaxinfer.integers import cdiv
from jaxinfer.kv_cache import CacheSpec, cache_spec
from jaxinfer.memory import Demand
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.planner import MemoryPlan
from jaxinfer.tokenizer import Tokenizer, load_tokenizer
from pallas_kernels import paged_attention
from sharding_rules import axes as ax

DEMO_MODEL = pathlib.Path(__file__).parent / "demo_model"
_DEFAULT_MAX_MODEL_LEN = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedEngine:
    """Everything that is known before memory is allocated."""

    config: EngineConfig
    model_dir: pathlib.Path
    definition: ModelDefinition
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    max_model_len: int
    slots_per_shard: int
    cache_spec: CacheSpec
    memory: MemoryPlan
    buckets: Buckets
    attention_backend: str


def resolve(config: EngineConfig) -> ResolvedEngine:
    """Reads the directory's small files and decides. Raises ValueError with the flag that would help."""
    model_dir = find_model_dir(config.model)
    hf = HFConfig.read(model_dir)
    model = models.for_architecture(hf.architecture).parse_config(hf)
    tokenizer = load_tokenizer(model_dir)
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{model_dir}: the tokenizer has {tokenizer.vocab_size} tokens and config.json's vocab_size is "
            f"{model.vocab_size}; the tokenizer belongs to another model"
        )
    generation = read_generation_config(
        model_dir,
        vocab_size=model.vocab_size,
        tokenizer_eos=tokenizer and tokenizer.eos_token_id,
        sampling=config.generation_config == "auto",
    )
    partitioner = Partitioner.create(config.mesh, config.sharding)
    on_cpu = partitioner.device.platform == "cpu"
    dtype = jnp.dtype(("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype)
    definition = ModelDefinition.create(model, partitioner, dtype)
    max_model_len = _max_model_len(config, model)
    page_size = config.page_size or (16 if on_cpu else 64)
    num_shards = partitioner.num_shards(ax.BATCH)
    if config.max_num_seqs % num_shards:
        raise ValueError(
            f"--max_num_seqs={config.max_num_seqs} does not divide over data:{num_shards}; "
            f"use {cdiv(config.max_num_seqs, num_shards) * num_shards}"
        )
    slots_per_shard = config.max_num_seqs // num_shards
    backend = "xla" if config.attention_backend == "auto" else config.attention_backend
    paged_attention.backend(backend, *attention_specs(model, partitioner, page_size))
    buckets = Buckets.create(
        max_rows=slots_per_shard,
        max_model_len=max_model_len,
        max_chunk=config.max_num_batched_tokens,
        page_size=page_size,
        decode_steps=config.decode_steps,
        num_shards=num_shards,
        min_chunk=32 if on_cpu else 128,  # fewer tokens take a GPU no less time: it waits for the weights
    )
    memory = Demand(
        config=dataclasses.replace(config, max_model_len=max_model_len),
        definition=definition,
        page_size=page_size,
        free_bytes=devices.free_bytes(partitioner.device),
    ).plan()
    return ResolvedEngine(
        config=config,
        model_dir=model_dir,
        definition=definition,
        tokenizer=tokenizer,
        generation=generation,
        max_model_len=max_model_len,
        slots_per_shard=slots_per_shard,
        cache_spec=cache_spec(model, partitioner, pages_per_shard=memory.num_pages, page_size=page_size, dtype=dtype),
        memory=memory,
        buckets=buckets,
        attention_backend=backend,
    )


def find_model_dir(model: str | None) -> pathlib.Path:
    """The directory named, or the demonstration model's. Nothing is downloaded."""
    if model is None:
        return DEMO_MODEL
    path = pathlib.Path(model).expanduser()
    if not path.is_dir():
        raise ValueError(f"--model={model}: no such directory; give a Hugging Face model directory on this machine")
    return path


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    wanted = config.max_model_len
    if wanted is not None and wanted > model.max_position:
        raise ValueError(
            f"--max_model_len={wanted} is beyond the {model.max_position} positions that the model was made for "
            f"(max_position_embeddings); use at most that"
        )
    return wanted or min(model.max_position, _DEFAULT_MAX_MODEL_LEN)
