"""From what the user chose to what will run: the model directory read, every "auto" decided, memory planned.

Nothing is allocated here, and nothing downstream changes what is decided here.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer import devices, models
from jaxinfer.batch import Buckets
from jaxinfer.config import EncoderConfig, ModelConfig
from jaxinfer.decoder_plan import plan_decoder, rows_per_shard, with_experts
from jaxinfer.encoder_batch import EncoderBuckets
from jaxinfer.engine_config import EngineConfig
from jaxinfer.generation_config import GenerationDefaults, read_generation_config
from jaxinfer.hf_config import HFConfig
from jaxinfer.kv_cache import CacheSpec, cache_spec
from jaxinfer.parameters import ModelDefinition, model_weights
from jaxinfer.partitioning import Partitioner
from jaxinfer.planner import EncoderMemoryPlan, MemoryPlan, encoder_workspace_bytes
from jaxinfer.planning.meshes import dividing
from jaxinfer.sentence_modules import POOLING_FILE, TEXT_FILE, check_modules, check_text, read_pooling
from jaxinfer.tokenizer import Tokenizer, load_tokenizer
from pallas_kernels import grouped_matmul, paged_attention
from sharding_rules import axes as ax

DEMO_MODEL = pathlib.Path(__file__).parent / "demo_model"
_DEFAULT_MAX_MODEL_LEN = 4096
_MOST_MESHES = 3  # in an error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """What is known of every model before memory is allocated.

    Attributes, where the name does not say it:
      experts: the backend of their products; None: there are none.
    """

    config: EngineConfig
    model_dir: pathlib.Path
    architecture: str
    definition: ModelDefinition
    tokenizer: Tokenizer | None
    max_model_len: int
    experts: grouped_matmul.Choice | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedEngine(ResolvedModel):
    """Of a decoder, everything that is."""

    generation: GenerationDefaults
    slots_per_shard: int
    cache_spec: CacheSpec
    memory: MemoryPlan
    buckets: Buckets
    attention: paged_attention.Choice

    @property
    def summary(self) -> str:
        cache_dtype = self.cache_spec.quantized_dtype
        over = f" over a cache of {cache_dtype}" if cache_dtype else ""
        experts = f"experts: {self.experts}\n" if self.experts else ""
        return f"attention: {self.attention}{over}\n{experts}{self.memory}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedEncoder(ResolvedModel):
    """Of an encoder, everything that is."""

    memory: EncoderMemoryPlan
    buckets: EncoderBuckets
    pooling: str  # that the directory asks for

    @property
    def summary(self) -> str:
        return str(self.memory)


FreeBytes = Callable[[jax.Device], int | None]


def resolve(
    config: EngineConfig, free_bytes: FreeBytes = devices.free_bytes, mesh_devices: list[jax.Device] | None = None
) -> ResolvedEngine | ResolvedEncoder:
    """Reads the directory's small files and decides. Raises ValueError with the flag that would help.

    `free_bytes` says how much memory the devices have left. The mesh is over the first of `mesh_devices`, or of all.
    """
    model = _resolve_model(config, mesh_devices)
    resolve_as = _resolve_encoder if models.is_encoder(model.definition.family) else _resolve_decoder
    return resolve_as(model, free_bytes(model.definition.partitioner.device))


def check_generates(model: str | None) -> None:
    """Raises ValueError for a model directory with an encoder. Reads config.json only."""
    architecture = HFConfig.read(find_model_dir(model)).architecture
    if models.is_encoder(models.for_architecture(architecture)):
        raise ValueError(generates_nothing(architecture))


def generates_nothing(architecture: str) -> str:
    """What to say to who wants text of an encoder."""
    return f"{architecture} is an encoder: it has embeddings and generates nothing; use Engine.embed"


def _resolve_model(config: EngineConfig, mesh_devices: list[jax.Device] | None) -> ResolvedModel:
    model_dir = find_model_dir(config.model)
    hf = HFConfig.read(model_dir)
    model = models.for_architecture(hf.architecture).parse_config(hf)
    partitioner = Partitioner.create(config.mesh, config.sharding, mesh_devices)
    model, experts = with_experts(model, config, partitioner, partitioner.device)
    tokenizer = load_tokenizer(model_dir)
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{model_dir}: the tokenizer has {tokenizer.vocab_size} tokens and config.json's vocab_size is "
            f"{model.vocab_size}; the tokenizer belongs to another model"
        )
    on_cpu = partitioner.device.platform == "cpu"
    dtype = jnp.dtype(("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype)
    return ResolvedModel(
        config=config,
        model_dir=model_dir,
        architecture=hf.architecture,
        definition=_definition(model, partitioner, dtype, config.sharding),
        tokenizer=tokenizer,
        max_model_len=_max_model_len(config, model.max_position),
        experts=experts,
    )


def _definition(
    model: ModelConfig | EncoderConfig, partitioner: Partitioner, dtype: jnp.dtype, sharding: str
) -> ModelDefinition:
    """Raises ValueError for a mesh over which the model does not divide, with those of as many devices that do."""
    try:
        return ModelDefinition.create(model, partitioner, dtype)
    except ValueError as error:
        if isinstance(model, EncoderConfig) or not (
            found := dividing(model_weights(model, dtype), partitioner.num_devices, sharding)
        ):
            raise
        meshes = " or ".join(f"--mesh={mesh}" for mesh in found[:_MOST_MESHES])
        raise ValueError(f"{error}; of {partitioner.num_devices} devices would divide: {meshes}") from None


def _resolve_decoder(model: ResolvedModel, free_bytes: int | None) -> ResolvedEngine:
    config, definition, tokenizer = model.config, model.definition, model.tokenizer
    partitioner, max_model_len = definition.partitioner, model.max_model_len
    generation = read_generation_config(
        model.model_dir,
        vocab_size=definition.config.vocab_size,
        tokenizer_eos=tokenizer and tokenizer.eos_token_id,
        sampling=config.generation_config == "auto",
    )
    plan = plan_decoder(
        dataclasses.replace(config, max_model_len=max_model_len),
        definition.decoder_config,
        partitioner,
        dtype=definition.dtype,
        weights_bytes=definition.shard_bytes,
        device=partitioner.device,
        free_bytes=free_bytes,
    )
    cache = cache_spec(
        definition.decoder_config,
        partitioner,
        pages_per_shard=plan.memory.pages_per_shard,
        page_size=plan.page_size,
        dtype=jnp.dtype(config.cache_dtype or definition.dtype),
    )
    return ResolvedEngine(
        **vars(model),
        generation=generation,
        slots_per_shard=plan.slots_per_shard,
        cache_spec=cache,
        memory=plan.memory,
        buckets=plan.buckets,
        attention=plan.attention,
    )


def _resolve_encoder(model: ResolvedModel, free_bytes: int | None) -> ResolvedEncoder:
    config, definition, partitioner = model.config, model.definition, model.definition.partitioner
    for name in ("page_size", "kv_cache_bytes", "kv_cache_dtype"):
        if (value := getattr(config, name)) != getattr(EngineConfig, name):
            raise ValueError(f"--{name}={value}: {model.architecture} is an encoder and has no cache; leave it out")
    if config.attention_backend != EngineConfig.attention_backend:
        value = config.attention_backend
        raise ValueError(f"--attention_backend={value}: {model.architecture} is an encoder, and has one; leave it out")
    pooling = _pooling(model.model_dir)
    num_shards = partitioner.num_shards(ax.BATCH)
    buckets = EncoderBuckets.create(
        max_rows=rows_per_shard(config, partitioner),
        max_model_len=model.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_shards=num_shards,
    )
    workspace_bytes = max(
        encoder_workspace_bytes(
            rows=shape.rows // num_shards,
            length=shape.length,
            num_heads=definition.config.num_q_heads // partitioner.num_shards(ax.HEADS),
            embed_dim=definition.config.embed_dim,
            mlp_dim=definition.config.mlp_dim // partitioner.num_shards(ax.MLP),
            itemsize=definition.dtype.itemsize,
        )
        for shape in buckets.shapes()
    )
    memory = EncoderMemoryPlan(
        weights_bytes=definition.shard_bytes,
        workspace_bytes=workspace_bytes,
        free_bytes=free_bytes,
    )
    memory.check_fits(config.memory_fraction)
    return ResolvedEncoder(**vars(model), memory=memory, buckets=buckets, pooling=pooling)


def _pooling(model_dir: pathlib.Path) -> str:
    """What sentence-transformers' files, if they are there, say; "mean" without them. Raises ValueError for more."""
    check_modules(model_dir)
    if (model_dir / TEXT_FILE).exists():
        check_text(model_dir / TEXT_FILE)
    if (model_dir / POOLING_FILE).exists():
        return read_pooling(model_dir / POOLING_FILE)
    return "mean"


def find_model_dir(model: str | None) -> pathlib.Path:
    """The directory named, or the demonstration model's. Nothing is downloaded."""
    if model is None:
        return DEMO_MODEL
    path = pathlib.Path(model).expanduser()
    if not path.is_dir():
        raise ValueError(f"--model={model}: no such directory; give a Hugging Face model directory on this machine")
    return path


def _max_model_len(config: EngineConfig, max_position: int) -> int:
    wanted = config.max_model_len
    if wanted is not None and wanted > max_position:
        raise ValueError(
            f"--max_model_len={wanted} is beyond the {max_position} positions that the model was made for "
            f"(max_position_embeddings); use at most that"
        )
    return wanted or min(max_position, _DEFAULT_MAX_MODEL_LEN)
