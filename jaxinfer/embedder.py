"""Runs an encoder: texts in, a vector for each out. What `Engine` does with a model that generates nothing.

Texts of about one length are read side by side, in programs that are all compiled before or while they do.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import encoder_batch
from jaxinfer.compilations import Compiling
from jaxinfer.encoder_batch import Array, EncoderBatch, EncoderShape
from jaxinfer.intake import Prompt, encode_prompt, read_each
from jaxinfer.metrics import EngineMetrics
from jaxinfer.programs import Program
from jaxinfer.request import FinishReason
from jaxinfer.request_stats import RequestStats
from jaxinfer.resolve import ResolvedEncoder
from jaxinfer.stats import EngineStats
from jaxinfer.steps import Arrays


class Vectors(NamedTuple):
    """Of each row of a step, float32 [B, D] by the name of the pooling."""

    mean: Array  # of its tokens' activations
    cls: Array  # its first token's


POOLINGS = Vectors._fields


def pool(hidden: jax.Array, lengths: jax.Array) -> Vectors:
    """Of activations [B, T, D] and the number of tokens of each row, int32 [B]. Summed in float32."""
    hidden = hidden.astype(jnp.float32)
    is_valid = jnp.arange(hidden.shape[1]) < lengths[:, None]
    total = jnp.sum(jnp.where(is_valid[..., None], hidden, 0), axis=1)
    return Vectors(mean=total / lengths[:, None].astype(jnp.float32), cls=hidden[:, 0])


class Embedder:
    """Weights on their devices, and a compiled program per shape."""

    def __init__(self, resolved: ResolvedEncoder, weights: Arrays, stats: EngineStats):
        self._resolved = resolved
        self._definition = resolved.definition
        self._weights = weights
        self._stats = stats
        self._totals = RequestStats()
        self._programs: Compiling[EncoderShape] = Compiling({})

    def start_compiling(self) -> None:
        """The program of every shape; a step waits for its own."""
        programs = {shape: self.program(shape) for shape in self._resolved.buckets.shapes()}
        self._programs = Compiling(programs)

    @property
    def is_compiling(self) -> bool:
        return not self._programs.is_done

    def finish_compiling(self, progress: Callable[[int, int], None] | None = None) -> float:
        """Waits for all, calling `progress(done, total)` after each -> seconds that it took."""
        return self._programs.wait(progress)

    @property
    def default_pooling(self) -> str:
        """What the model's directory asks for."""
        return self._resolved.pooling

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt. Raises ValueError, with the place in the list, for one that cannot be read."""
        return read_each(prompts, self._encode)

    def embed(
        self, texts: Sequence[Sequence[int]], pooling: str, progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """float32 [len(texts), D], pooled as the one of `POOLINGS` that is named, and not normalised.

        `progress(done, total)` counts texts. Raises RuntimeError, which says where, for values that are not finite.
        """
        start = time.perf_counter()
        vectors = np.empty((len(texts), self._definition.config.embed_dim), np.float32)
        steps = self._resolved.buckets.plan([*map(len, texts)])
        started = ((places, self._dispatch(shape, [texts[place] for place in places])) for shape, places in steps)
        num_done = 0
        # In pairs, so that the next step is under way while the host takes in one.
        for (places, output), _ in itertools.pairwise(itertools.chain(started, [([], None)])):
            vectors[places] = np.asarray(getattr(output, pooling))[: len(places)]
            num_done += len(places)
            if progress is not None:
                progress(num_done, len(texts))
        if len(wrong := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
            named = f"{', '.join(map(str, wrong[:10]))}{', ...' if len(wrong) > 10 else ''}"
            raise RuntimeError(f"the model produced values that are not finite; prompts {named}")
        self._count(len(steps), [*map(len, texts)], time.perf_counter() - start)
        return vectors

    def metrics(self, num_compilations_after_ready: int) -> EngineMetrics:
        """What has no meaning for an encoder is 0."""
        return EngineMetrics(
            num_running=0,
            num_waiting=0,
            kv_cache_usage=0.0,
            num_steps=self._stats.steps,
            num_preemptions=0,
            num_compilations_after_ready=num_compilations_after_ready,
            prompt_tokens=self._totals.prompt_tokens,
            cached_prompt_tokens=0,
            generation_tokens=0,
            finished={reason.value: count for reason, count in self._totals.finished.items()},
            expert_tokens={},
            **self._totals.latencies,
        )

    def close(self) -> None:
        """Frees the device memory."""
        for array in self._weights:
            array.delete()
        self._weights = ()
        self._programs.close()
        self._programs = Compiling({})

    def program(self, shape: EncoderShape) -> Program:
        """The program of a shape: (weights, batch) -> Vectors."""
        batch = encoder_batch.build(shape, [])
        abstract = jax.tree.map(
            lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
            batch,
            self._shardings(batch),
        )
        replicated = self._definition.partitioner.replicated  # for every host to read
        return Program(
            name="encode",
            settings=self._definition.settings,
            function=self._vectors,
            arguments=(self._definition.abstract_arrays, abstract),
            outputs=Vectors(replicated, replicated),
        )

    def _vectors(self, weights: Arrays, batch: EncoderBatch) -> Vectors:
        model = self._definition.bind_encoder(weights)
        return pool(model(batch.tokens, batch.lengths), batch.lengths)

    def _dispatch(self, shape: EncoderShape, texts: list[Sequence[int]]) -> Vectors:
        """Starts a step and returns its output, on the devices, without waiting for it."""
        batch = encoder_batch.build(shape, texts)
        output = self._programs[shape](self._weights, jax.device_put(batch, self._shardings(batch)))
        for array in output:
            array.copy_to_host_async()
        return output

    def _shardings(self, batch: EncoderBatch) -> EncoderBatch:
        return EncoderBatch(*(self._definition.partitioner.row_sharding(array.shape) for array in batch))

    def _encode(self, prompt: Prompt) -> list[int]:
        token_ids = encode_prompt(prompt, self._resolved.tokenizer, self._definition.config.vocab_size)
        if len(token_ids) > (most := self._resolved.max_model_len):
            raise ValueError(f"prompt of {len(token_ids)} tokens is longer than --max_model_len={most}; shorten it")
        return token_ids

    def _count(self, num_steps: int, lengths: list[int], seconds: float) -> None:
        self._stats.add_encoder_steps(num_steps, sum(lengths), seconds)
        self._totals.prompt_tokens += sum(lengths)
        self._totals.finished[FinishReason.STOP] += len(lengths)
