"""Owns what is on the devices: weights, cache, and one compiled program per shape.

Two kinds of program: `prefill` takes a chunk of a prompt per data shard, `decode` takes the last token of every
running sequence and generates up to `decode_steps` more. Both donate the cache. All are compiled by
`compile_all`; a shape outside that list is an error, never a silent compilation.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import kv_cache
from jaxinfer.attention import PagedAttention, attention_spec
from jaxinfer.batch import Buckets, DecodeBatch, PrefillBatch
from jaxinfer.kv_cache import Cache, CacheSpec
from jaxinfer.parameters import ModelDefinition
from jaxinfer.request import MAX_STOP_TOKEN_IDS
from jaxinfer.sampling import SamplingArrays, sample
from pallas_kernels import paged_attention
from sharding_rules import axes as ax

Arrays = tuple[jax.Array, ...]


class PrefillOutput(NamedTuple):
    """tokens int32 [B]: the first token of each row, meaningful for a last chunk; finite bool [B]."""

    tokens: Any
    finite: Any


class DecodeOutput(NamedTuple):
    """tokens int32 [B, num_steps], of which the first `counts` int32 [B] were generated; finite bool [B]."""

    tokens: Any
    counts: Any
    finite: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFunctions:
    """The pure functions behind the programs: (weights, cache, batch) -> (cache, output).

    A row whose logits are not finite generates nothing more and is reported; it never reaches another row.
    """

    definition: ModelDefinition
    page_size: int
    backend_name: str
    num_steps: int

    def prefill(self, weights: Arrays, cache: Cache, batch: PrefillBatch) -> tuple[Cache, PrefillOutput]:
        """Caches a chunk and samples the token after it. Donates `cache`."""
        num_tokens = batch.tokens.shape[1]
        offsets = jnp.arange(num_tokens, dtype=jnp.int32)
        valid = offsets < batch.length[:, None]
        positions = jnp.where(valid, batch.start[:, None] + offsets, 0)
        model = self.definition.bind(weights)
        attend = self._attend(cache, batch.block_tables, positions, valid)
        hidden = model(batch.tokens, positions, attend)
        last = jnp.maximum(batch.length - 1, 0)
        logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
        tokens = sample(logits, batch.sampling, batch.start + batch.length, self._gather)
        finite = jnp.all(jnp.isfinite(logits), axis=-1) | (batch.length == 0)
        return attend.cache, PrefillOutput(tokens, finite)

    def decode(self, weights: Arrays, cache: Cache, batch: DecodeBatch) -> tuple[Cache, DecodeOutput]:
        """Generates up to `num_steps` tokens per row, stopping each row by itself. Donates `cache`."""
        model = self.definition.bind(weights)
        rows = batch.tokens.shape[0]

        def step(i: jax.Array, state):
            cache, tokens, positions, active, finite, out, counts = state
            attend = self._attend(cache, batch.block_tables, positions[:, None], active[:, None])
            logits = model.logits(model(tokens[:, None], positions[:, None], attend)[:, 0])
            is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
            finite &= is_finite | ~active
            active &= is_finite
            new = sample(logits, batch.sampling, positions + 1, self._gather)
            tokens = jnp.where(active, new, tokens)
            out = lax.dynamic_update_index_in_dim(out, tokens, i, axis=1)
            positions += active.astype(jnp.int32)
            counts += active.astype(jnp.int32)
            stopped = jnp.any(tokens[:, None] == batch.stop_token_ids, axis=1)
            active &= ~stopped & (counts < batch.num_remaining)
            return attend.cache, tokens, positions, active, finite, out, counts

        state = (
            cache,
            batch.tokens,
            batch.positions,
            batch.num_remaining > 0,
            jnp.ones(rows, bool),
            jnp.zeros((rows, self.num_steps), jnp.int32),
            jnp.zeros(rows, jnp.int32),
        )
        cache, _, _, _, finite, out, counts = lax.fori_loop(0, self.num_steps, step, state)
        return cache, DecodeOutput(out, counts, finite)

    def _gather(self, logits: jax.Array) -> jax.Array:
        return self.definition.partitioner.constrain(logits, (ax.BATCH, None))

    def _attend(self, cache: Cache, block_tables: jax.Array, positions: jax.Array, valid: jax.Array) -> PagedAttention:
        spec = attention_spec(self.definition.config, self.definition.partitioner, self.page_size)
        return PagedAttention(
            cache,
            block_tables,
            positions,
            valid,
            spec=spec,
            backend=paged_attention.backend(self.backend_name, spec),
            partitioner=self.definition.partitioner,
        )


class Runner:
    """Runs prefill and decode steps over weights and cache that it holds."""

    def __init__(
        self,
        definition: ModelDefinition,
        weights: Arrays,
        spec: CacheSpec,
        buckets: Buckets,
        *,
        num_steps: int,
        backend: str,
    ):
        self.definition = definition
        self.buckets = buckets
        self.num_steps = num_steps
        self._partitioner = definition.partitioner
        self._spec = spec
        self._weights = weights
        self.reset_cache()
        self._functions = StepFunctions(
            definition=definition, page_size=spec.page_size, backend_name=backend, num_steps=num_steps
        )
        self._programs: dict[tuple[str, int, int], jax.stages.Compiled] = {}

    def compile_all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program in `buckets`, calling `progress(done, total)` after each."""
        shapes = [("prefill", *shape) for shape in self.buckets.prefill_shapes()]
        shapes += [("decode", *shape) for shape in self.buckets.decode_shapes()]
        with ThreadPoolExecutor() as pool:
            futures = {pool.submit(self.lowered(*shape).compile): shape for shape in shapes}
            for done, future in enumerate(as_completed(futures), start=1):
                self._programs[futures[future]] = future.result()
                if progress is not None:
                    progress(done, len(shapes))

    def prefill(self, batch: PrefillBatch) -> PrefillOutput:
        """Caches a chunk per row and returns the tokens after them, as NumPy arrays."""
        return PrefillOutput(*self._run(("prefill", batch.tokens.shape[1], batch.block_tables.shape[1]), batch))

    def decode(self, batch: DecodeBatch) -> DecodeOutput:
        """Generates up to `num_steps` tokens per row, as NumPy arrays."""
        rows_per_shard = batch.tokens.shape[0] // self._partitioner.num_shards(ax.BATCH)
        return DecodeOutput(*self._run(("decode", rows_per_shard, batch.block_tables.shape[1]), batch))

    def reset_cache(self) -> None:
        """Makes a new, empty cache: at the start, and after a step that failed and took the donated one with it."""
        self._cache = kv_cache.allocate(self._spec, self._partitioner)

    def close(self) -> None:
        """Frees the device memory."""
        for array in jax.tree.leaves((self._weights, self._cache)):
            array.delete()
        self._weights, self._cache = (), ()
        self._programs.clear()

    def lowered(self, kind: str, size: int, num_pages: int) -> jax.stages.Lowered:
        """The program of a shape: (tokens, pages) for "prefill", (rows per shard, pages) for "decode"."""
        function = {"prefill": self._functions.prefill, "decode": self._functions.decode}[kind]
        output_type = {"prefill": PrefillOutput, "decode": DecodeOutput}[kind]
        cache_sharding = kv_cache.cache_sharding(self._spec, self._partitioner)
        cache = jax.ShapeDtypeStruct(self._spec.shape, self._spec.dtype, sharding=cache_sharding)
        weights = tuple(jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding) for p in self.definition.params)
        replicated = self._partitioner.replicated  # so that every host can read the output
        shardings = (
            ((cache_sharding,) * 2,) * self._spec.num_layers,
            output_type(*([replicated] * len(output_type._fields))),
        )
        jitted = jax.jit(function, donate_argnums=1, out_shardings=shardings)
        return jitted.lower(
            weights, ((cache, cache),) * self._spec.num_layers, self._abstract_batch(kind, size, num_pages)
        )

    def _run(self, key: tuple[str, int, int], batch: PrefillBatch | DecodeBatch) -> list[np.ndarray]:
        if key not in self._programs:
            raise RuntimeError(f"{key} is not a compiled shape; compiled: {sorted(self._programs)}")
        batch = jax.tree.map(lambda a: jax.device_put(a, self._row_sharding(a.shape)), batch)
        self._cache, output = self._programs[key](self._weights, self._cache, batch)
        return jax.device_get(list(output))

    def _abstract_batch(self, kind: str, size: int, num_pages: int) -> PrefillBatch | DecodeBatch:
        num_shards = self._partitioner.num_shards(ax.BATCH)
        rows = num_shards if kind == "prefill" else num_shards * size

        def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._row_sharding(shape))

        block_tables = array(jnp.int32, rows, num_pages)
        sampling = SamplingArrays(
            temperature=array(jnp.float32, rows),
            top_k=array(jnp.int32, rows),
            top_p=array(jnp.float32, rows),
            seed=array(jnp.uint32, rows),
            draws=array(jnp.bool_),
            truncates=array(jnp.bool_),
        )
        row = array(jnp.int32, rows)
        if kind == "prefill":
            return PrefillBatch(array(jnp.int32, rows, size), row, row, block_tables, sampling)
        return DecodeBatch(row, row, row, array(jnp.int32, rows, MAX_STOP_TOKEN_IDS), block_tables, sampling)

    def _row_sharding(self, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        if not shape:
            return self._partitioner.replicated
        return self._partitioner.sharding((ax.BATCH, *[None] * (len(shape) - 1)))
