"""Plans a device's memory for a model on a mesh, and names what would fit where that does not."""

import bisect
import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax.numpy as jnp

from jaxinfer import planner
from jaxinfer.attention import attention_specs
from jaxinfer.batch import max_chunk_tokens
from jaxinfer.config import ModelConfig, MoEConfig
from jaxinfer.engine_config import EngineConfig
from jaxinfer.extras import ExtrasSpec
from jaxinfer.integers import cdiv
from jaxinfer.layers.experts import expected_rows, is_exchanged
from jaxinfer.layouts import AxisSplits, Layout, mesh_text, parse_mesh
from jaxinfer.parameters import ModelDefinition, model_weights
from jaxinfer.planner import MemoryPlan
from jaxinfer.stages import num_microbatches
from jaxinfer.step_plan import num_chunks
from pallas_kernels import grouped_matmul
from sharding_rules import axes as ax

# Of all logits on one device, as XLA was seen to allocate: as they are, processed, scaled, with noise, and what is left
# of these in each turn of a draw.
_LOGITS_COPIES = {"cpu": 10, "gpu": 6}
_NUM_RESIDUALS = {"cpu": 1, "gpu": 3}  # alive at once; with stages one more, of what left them
_MERGED_BYTES = 32 * 2**20  # of a product with what it takes, below which XLA for GPUs makes one of two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """What an engine asks of each device.

    Attributes:
      config: as the user gave it, but for `max_model_len`, which is decided.
      model: its numbers.
      splits: the mesh and the rules.
      platform: of the mesh's devices, as JAX calls it.
      dtype: of the weights.
      weights_bytes: of one device.
      page_size: tokens per page.
      attention: a backend in `pallas_kernels/paged_attention/`.
      free_bytes: of a device; None if it does not say.
    """

    config: EngineConfig
    model: ModelConfig
    splits: AxisSplits
    platform: str
    dtype: jnp.dtype
    weights_bytes: int
    page_size: int
    attention: ModuleType
    free_bytes: int | None

    @classmethod
    def of(cls, definition: ModelDefinition, **fields: Any) -> "Demand":
        """For a decoder on its mesh; `fields` are the others."""
        mesh = {"splits": definition.partitioner, "platform": definition.partitioner.platform}
        weights = {"dtype": definition.dtype, "weights_bytes": definition.shard_bytes}
        return cls(model=definition.decoder_config, **mesh, **weights, **fields)

    def plan(self, *, advise: bool = True) -> MemoryPlan:
        """Raises ValueError when it does not fit: if `advise`, with the flags of which each alone would make it fit."""
        try:
            return self._plan()
        except ValueError as error:
            if not advise:
                raise
            flags = " or ".join(self._flags_that_fit())
            raise ValueError(f"{error}; would fit: {flags or 'a smaller model'}") from None

    def _plan(self) -> MemoryPlan:
        config, model, splits = self.config, self.model, self.splits
        assert config.max_model_len is not None
        num_shards = splits.num_shards(ax.BATCH)
        specs = attention_specs(model, splits, self.page_size, config.cache_dtype)
        spec = specs[0][0]  # but for windows all are alike
        if reason := self.attention.unsupported(dataclasses.replace(spec, dtype=self.dtype.name)):
            raise ValueError(reason)
        itemsize = self.dtype.itemsize
        rows = config.max_num_seqs // num_shards
        chunks = num_chunks(rows)
        chunk_tokens = max_chunk_tokens(config.max_num_batched_tokens, config.max_model_len, rows)
        num_tokens = rows + chunk_tokens
        parts = num_microbatches(splits.axis_size(ax.STAGE), chunk_tokens, self.platform)  # of which a stage has one
        of_part = cdiv(num_tokens, parts)
        of_heads = of_part * (spec.num_q_heads + spec.num_kv_heads) * spec.head_dim * itemsize
        of_step = planner.workspace_bytes(
            residual_bytes=num_tokens * model.embed_dim * itemsize,
            num_residuals=_NUM_RESIDUALS.get(self.platform, _NUM_RESIDUALS["gpu"]) + (1 if parts > 1 else 0),
            projections_bytes=3 * of_heads,  # 3: before they are rotated, in halves, and together again
            attention_bytes=self.attention.workspace_bytes(
                spec,
                rows=cdiv(rows, parts),
                chunks=chunks,
                chunk_tokens=cdiv(chunk_tokens, parts),
                context_tokens=config.max_model_len,
                itemsize=itemsize,
            ),
            mlp_bytes=self._mlp_bytes(of_part),
            sampling_bytes=self._sampling_bytes(rows + chunks),
        )
        sampling = ExtrasSpec(rows, config.max_model_len, model.vocab_size, chunk_tokens)
        needs = planner.MemoryNeeds(
            weights_bytes=self.weights_bytes,
            workspace_bytes=of_step + sampling.slots_bytes,
            kept_bytes=sampling.slots_bytes,
            page_bytes=planner.page_bytes(
                num_layers=len(specs),
                token_bytes=spec.token_bytes(itemsize),
                page_size=self.page_size,
            ),
            page_size=self.page_size,
            max_model_len=config.max_model_len,
            num_shards=num_shards,
            context_size=splits.context_size,
            free_bytes=self.free_bytes,
            unreachable_pages=self.attention.unreachable_pages(spec),
        )
        return planner.plan_memory(
            needs,
            sequences_per_shard=rows,
            memory_fraction=config.memory_fraction,
            kv_cache_bytes=config.kv_cache_bytes,
        )

    def _sampling_bytes(self, num_drawn: int) -> int:
        """Of the program that draws with all options. It is given logits as the head computed them, in shards."""
        copies = _LOGITS_COPIES.get(self.platform, _LOGITS_COPIES["gpu"])
        logits, num_shards = 4 * num_drawn * self.model.vocab_size, self.splits.num_shards(ax.VOCAB)
        return copies * logits + (logits // num_shards if num_shards > 1 else 0)

    def _mlp_bytes(self, num_tokens: int) -> int:
        """Of the widest MLP on one device."""
        model, num_shards = self.model, self.splits.num_shards(ax.MLP)
        widest = self._num_of_mlp(num_tokens, model.mlp_dim // num_shards)
        if (moe := model.moe) is not None:
            shared = self._num_of_mlp(num_tokens, moe.shared_mlp_dim // num_shards)
            widest = max(widest if moe.dense_layers else 0, self._num_of_experts(moe, num_tokens), shared)
        return widest * self.dtype.itemsize

    def _num_of_mlp(self, num_tokens: int, mlp_dim: int) -> int:
        """Numbers: of gate, up and the two multiplied.

        These XLA for GPUs writes over gate or up, unless it makes one product of both, as it does of small ones.
        """
        embed_dim = self.model.embed_dim
        of_product = (num_tokens * (embed_dim + mlp_dim) + embed_dim * mlp_dim) * self.dtype.itemsize
        return (3 if self.platform == "cpu" or of_product < _MERGED_BYTES else 2) * num_tokens * mlp_dim

    def _num_of_experts(self, moe: MoEConfig, num_tokens: int) -> int:
        """Numbers. Each token comes in a row for each of its experts.

        Where rows travel, in 3 more at a time: as they are sent, received, put together over the rounds.
        """
        splits, embed_dim = self.splits, self.model.embed_dim
        routed = num_tokens * moe.num_experts_per_token
        travelling = 3 * routed * embed_dim if is_exchanged(splits) else 0
        return travelling + grouped_matmul.backend(moe.backend).workspace_numbers(
            num_rows=routed,
            num_expected=expected_rows(routed, splits),
            num_groups=max(map(len, moe.placements), default=moe.num_experts) // splits.num_shards(ax.EXPERTS),
            embed_dim=embed_dim,
            mlp_dim=moe.mlp_dim // splits.num_shards(ax.EXPERT_MLP),
        )

    def _fits(self, **flags: object) -> bool:
        """With these flags changed, of which the weights know nothing."""
        try:
            dataclasses.replace(self, config=dataclasses.replace(self.config, **flags))._plan()
        except ValueError:
            return False
        return True

    def _flags_that_fit(self) -> Iterator[str]:
        """Smaller sizes, as large as fits, shorter dtypes, and the first larger mesh of each kind."""
        if self.config.kv_cache_bytes is not None and self._fits(kv_cache_bytes=None):
            yield "no --kv_cache_bytes at all"
        num_shards = self.splits.num_shards(ax.BATCH)
        for name, step in (("max_model_len", 1), ("max_num_seqs", num_shards), ("max_num_batched_tokens", 1)):
            smaller = range(max(2, step), getattr(self.config, name), step)
            if size := _largest(lambda n, name=name: self._fits(**{name: n}), smaller):
                yield f"--{name}={size}"
        if self.dtype == jnp.float32 and self._with(self.splits, jnp.dtype(jnp.bfloat16))._fits():
            yield "--dtype=bfloat16"
        if self.config.cache_dtype is None and self._fits(kv_cache_dtype="int8"):
            yield "--kv_cache_dtype=int8"
        pages = cdiv(self.config.max_model_len or 1, self.page_size)
        for axis, limit in ((ax.TENSOR, self.model.num_q_heads), (ax.CONTEXT, pages)):
            if mesh := next(filter(self._fits_on, self._larger_meshes(axis, limit)), None):
                yield f"--mesh={mesh}"

    def _larger_meshes(self, axis: str, limit: int) -> Iterator[str]:
        """The mesh with this axis doubled, again and again as far as there is something to split."""
        sizes = parse_mesh(self.config.mesh)
        size = sizes.pop(axis, 1)
        while (size := 2 * size) <= limit:
            yield mesh_text(sizes | {axis: size})

    def _fits_on(self, mesh: str) -> bool:
        try:
            splits = Layout.create(mesh, self.config.sharding, self.splits.device_kind)
            return self._with(splits, self.dtype)._fits()
        except ValueError:  # the model does not divide over it
            return False

    def _with(self, splits: AxisSplits, dtype: jnp.dtype) -> "Demand":
        num_bytes = model_weights(self.model, dtype).on_mesh(splits).num_bytes
        return dataclasses.replace(self, splits=splits, dtype=dtype, weights_bytes=num_bytes)


def _largest(fits: Callable[[int], bool], sizes: range) -> int | None:
    """The largest size that fits, where with a size all smaller ones fit; None if none does."""
    num_fitting = bisect.bisect_left(sizes, True, key=lambda n: not fits(n))
    return sizes[num_fitting - 1] if num_fitting else None
