"""The paged cache of keys and values: allocated once, donated to every step, written in place.

Per layer two arrays [num_pages, num_kv_heads, page_size, head_dim], so that one (page, head) tile is
contiguous; or one, where values are part of the keys. Of a quantised cache each comes with its scales,
[num_pages, num_kv_heads, page_size]: `Pages`. Page 0 is the scratch page: padding writes there, and what is
read there counts for nothing; hence no page id is ever negative or out of range (JAX would scatter at -1 into the last
page). With `data` in the mesh the pages are divided among its shards, and with `context` those of a shard among its
devices, each of which has a scratch page; page ids in block tables are local to a data shard, as `page_allocator` has
them. With `stage` an array is that of a slot for layers, and has the pages of each stage.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxinfer.compilations import compile_program
from jaxinfer.config import ModelConfig
from jaxinfer.layouts import AxisSplits, num_sharded_kv_heads
from jaxinfer.partitioning import Partitioner
from jaxinfer.programs import Program
from jaxinfer.stages import StagePlan
from pallas_kernels.paged_attention.pages import LARGEST, Pages, QuantizedPages, quantize
from sharding_rules import axes as ax

T = TypeVar("T")

PAGE_AXES: ax.LogicalAxes = (ax.PAGES, ax.KV_HEADS, None, ax.HEAD_DIM)

Cache = tuple[tuple[Pages, Pages | None], ...]  # (k_pages, v_pages) of each layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Shape of the cache over the whole mesh.

    Attributes:
      num_slots: how many pairs of arrays: slots for layers, as `stages` has them; without stages, layers.
      num_stages: of the pipeline; an array has the pages of each, one stage after the other.
      has_values: whether a pair has its second array.
      num_pages: of one array, on all devices together, scratch pages included.
      num_kv_heads: repetitions over the mesh included.
      page_size: tokens per page.
      head_dim: of keys and values.
      dtype: of keys and values; one of 8 bits has scales beside it.
    """

    num_slots: int
    num_stages: int
    has_values: bool
    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: jnp.dtype

    def layers(self, make: Callable[[], T]) -> tuple[tuple[T, T | None], ...]:
        """What has the structure of a cache, array by array from `make`."""
        return tuple((make(), make() if self.has_values else None) for _ in range(self.num_slots))

    @property
    def quantized_dtype(self) -> str | None:
        """As `AttentionSpec.cache_dtype` has it."""
        return self.dtype.name if self.dtype.name in LARGEST else None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.num_pages, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def axes(self) -> ax.Dimensions:
        """Not with a dimension for the stages, beside which XLA:CPU was seen to lay a cache out anew in each step."""
        return ((ax.LAYERS, ax.PAGES), *PAGE_AXES[1:]) if self.num_stages > 1 else PAGE_AXES


def cache_spec(
    config: ModelConfig, splits: AxisSplits, *, pages_per_shard: int, page_size: int, dtype: jnp.dtype
) -> CacheSpec:
    """The cache for a model on a mesh, with `pages_per_shard` in each data shard, scratch pages included."""
    plan = StagePlan.create(config.num_layers, splits.axis_size(ax.STAGE))
    return CacheSpec(
        num_slots=len(plan.slots),
        num_stages=plan.num_stages,
        has_values=config.latent is None,
        num_pages=pages_per_shard * splits.num_shards(ax.BATCH) * plan.num_stages,
        num_kv_heads=num_sharded_kv_heads(config.num_kv_heads, splits),
        page_size=page_size,
        head_dim=config.head_dim,
        dtype=jnp.dtype(dtype),
    )


def cache_sharding(spec: CacheSpec, partitioner: Partitioner) -> NamedSharding:
    return partitioner.sharding(spec.axes, spec.shape, "cache")


def abstract_pages(spec: CacheSpec, partitioner: Partitioner) -> Any:
    """Shapes and shardings of what the arrays of a cache are made of: one each, or of `QuantizedPages`."""
    values = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=cache_sharding(spec, partitioner))
    if spec.quantized_dtype is None:
        return values
    sharding = partitioner.sharding(spec.axes[:-1], spec.shape[:-1], "scales of the cache")
    return QuantizedPages(values, jax.ShapeDtypeStruct(spec.shape[:-1], jnp.float32, sharding=sharding))  # pyright: ignore[reportArgumentType]


def allocator(spec: CacheSpec, partitioner: Partitioner) -> Callable[[], Cache]:
    """A function that makes an empty cache on its devices, compiled here and not when it is called.

    Zeros and not empty: jax >= 0.11 really leaves empty uninitialised.
    """
    pages = abstract_pages(spec, partitioner)
    shardings = jax.tree.map(lambda x: x.sharding, pages)
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), pages)  # noqa: E731
    settings = repr((spec, partitioner.settings))
    make = compile_program(Program(name="cache", settings=settings, function=zeros, arguments=(), outputs=shardings))
    return lambda: spec.layers(make)


def write(pages: Pages, new: jax.Array, page_ids: jax.Array, positions: jax.Array) -> Pages:
    """Puts the keys or values of S tokens at their positions in their pages, quantised if these are.

    pages [P, K, page_size, H], new [S, K, H], page_ids int32 [S], positions int32 [S] in their sequences. For one
    data shard.
    page_size 4, page_ids [7, 2], positions [3, 4] -> pages 7 and 2, rows 3 and 0.
    """

    def put(pages: jax.Array, new: jax.Array) -> jax.Array:
        rows = positions % pages.shape[2]
        return pages.at[page_ids, :, rows].set(new.astype(pages.dtype), mode="promise_in_bounds")

    if isinstance(pages, QuantizedPages):
        return jax.tree.map(put, pages, quantize(new, pages.values.dtype))
    return put(pages, new)
