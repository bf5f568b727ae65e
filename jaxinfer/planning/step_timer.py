"""An engine's own compiled steps, timed one at a time: what `roofline` predicts, for the same `Load`."""

import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxinfer import kv_cache
from jaxinfer.batch import Buckets, ChunkArrays, StepBatch, StepShape
from jaxinfer.compilations import compile_all
from jaxinfer.integers import cdiv
from jaxinfer.parameters import ModelDefinition
from jaxinfer.planning.loads import Load
from jaxinfer.step_programs import StepPrograms
from jaxinfer.steps import Arrays, SlotState

_MANY = 2**20  # tokens that a row may still generate: none ends
_TEMPERATURE, _TOP_P = 0.6, 0.9  # as Llama 3.1's generation_config.json has them


class StepTimer:
    """Steps of each of `loads` over random tokens, on the one device of a model, with a cache that they share.

    A step without a chunk is one of `num_steps` tokens of each row. `weights` stay the caller's.
    """

    def __init__(
        self,
        definition: ModelDefinition,
        weights: Arrays,
        loads: Sequence[Load],
        *,
        page_size: int,
        backend: str,
        num_steps: int = 8,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._weights, self._clock, self._num_steps = weights, clock, num_steps
        self._partitioner = definition.partitioner
        self._pages = cdiv(max(map(_last_position, loads)) + 1 + num_steps, page_size)
        num_rows = max(load.rows + (load.chunk_tokens > 0) for load in loads)
        most_tokens = max(1, *(load.chunk_tokens for load in loads))
        pages = (self._pages,)
        buckets = Buckets((num_rows,), pages, pages, (most_tokens,), page_size, num_steps, num_shards=1)
        spec = kv_cache.cache_spec(
            definition.decoder_config,
            definition.partitioner,
            pages_per_shard=1 + num_rows * self._pages,
            page_size=page_size,
            dtype=definition.dtype,
        )
        self._steps = StepPrograms(definition=definition, cache_spec=spec, buckets=buckets, backend=backend)
        shapes = dict.fromkeys(map(self._shape, loads))
        self._programs = compile_all({shape: self._steps.program(shape) for shape in shapes})
        self._cache = kv_cache.allocator(spec, definition.partitioner)()
        slots = self._steps.slot_shape
        self._slots = self._partitioner.put_rows(SlotState(np.zeros(slots, np.int32), np.zeros(slots, np.bool_)))
        self._batches = {load: self._batch(load) for load in loads}

    def seconds(self, load: Load, *, draws: bool = True) -> float:
        """Of one step, from the host's arrays to the tokens on the host; of several tokens a row, of one of them.

        All rows draw within top-p, or none does.
        """
        shape, batch = self._shape(load), self._batches[load]
        if not draws:
            batch = batch._replace(sampling=batch.sampling._replace(draws=np.array(False)))
        start = self._clock()
        of_step = self._partitioner.put_rows(batch)
        self._cache, self._slots, output, _ = self._programs[shape](self._weights, self._cache, self._slots, of_step)
        counts = np.asarray(output.counts)
        seconds = self._clock() - start
        assert counts.min() == shape.num_steps, "a row ended"
        return seconds / shape.num_steps

    def close(self) -> None:
        """Frees the cache."""
        for array in jax.tree.leaves((self._cache, self._slots)):
            array.delete()

    def _shape(self, load: Load) -> StepShape:
        chunks = int(load.chunk_tokens > 0)
        return StepShape(load.chunk_tokens, chunks, load.rows, self._pages, 1 if chunks else self._num_steps)

    def _batch(self, load: Load) -> StepBatch:
        """Each row in its own slot and pages, and the chunk behind them."""
        shape = self._shape(load)
        empty = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), self._steps.batch(shape))
        row = np.arange(shape.rows + shape.chunks, dtype=np.int32)[None]
        tables = 1 + np.arange(row.size * self._pages, dtype=np.int32).reshape(1, -1, self._pages)
        ones = np.ones(row.size, np.float32)
        sampling = empty.sampling._replace(
            temperature=_TEMPERATURE * ones, top_p=_TOP_P * ones, draws=np.array(True), truncates=np.array(True)
        )
        positions = np.where(row < shape.rows, math.floor(load.context), _last_position(load)).astype(np.int32)
        chunks = None
        if shape.chunks:
            start = _last_position(load) + 1 - load.chunk_tokens
            tokens = np.arange(load.chunk_tokens, dtype=np.int32)[None] % self._steps.definition.config.vocab_size
            chunks = ChunkArrays(tokens, np.array([[start]], np.int32), np.array([[load.chunk_tokens]], np.int32))
        return empty._replace(
            slots=row,
            positions=positions,
            num_remaining=np.full_like(row, _MANY),
            stop_token_ids=empty.stop_token_ids - 1,
            block_tables=tables,
            sampling=sampling,
            chunks=chunks,
        )


def _last_position(load: Load) -> int:
    """That the step writes."""
    of_chunk = math.ceil(load.chunk_context + load.chunk_tokens / 2) - 1 if load.chunk_tokens else 0
    return max(math.floor(load.context) if load.rows else 0, of_chunk)
