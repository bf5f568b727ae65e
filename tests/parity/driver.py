"""Drives a Runner without an Engine: few compiled shapes, and a view of the logits at every position."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import batch, kv_cache, models, steps
from jaxinfer.checkpoint.hf_reader import load_weights
from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.config import ModelConfig
from jaxinfer.engine_core import step_result
from jaxinfer.hf_config import HFConfig
from jaxinfer.integers import cdiv
from jaxinfer.output_text import OutputText
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.request import Request
from jaxinfer.runner import Runner
from jaxinfer.sampler_lowerings import SamplerLowerings
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduler import Scheduler
from jaxinfer.shard import ShardSizes
from jaxinfer.step_plan import StepPlan
from jaxinfer.step_programs import StepPrograms
from jaxinfer.steps import Arrays
from sharding_rules import axes as ax
from tests.parity import recipe


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is compiled: one prefill and one decode program.

    Attributes:
      rows: sequences per data shard; two or more, or data shards, for `num_steps` 0.
      max_len: tokens of a sequence, prompt and output.
      chunk: tokens of prompts that are cached at once.
      page_size: tokens per page.
      num_steps: tokens of each row in a step without a chunk. 0: one token, by the prefill program, which is the only
        one, in half the time of two.
      cache_dtype: of a quantised cache.
    """

    rows: int
    max_len: int
    chunk: int
    page_size: int = 16
    num_steps: int = 16
    cache_dtype: str | None = None

    def buckets(self, num_shards: int = 1) -> batch.Buckets:
        pages = cdiv(self.max_len, self.page_size)
        sizes = ((self.rows,), (pages,), (pages,), (self.chunk,))
        kind = batch.Buckets if self.num_steps else _AlwaysWithChunks
        return kind(*sizes, self.page_size, self.num_steps or 1, num_shards)

    def pages_per_shard(self, context_size: int) -> int:
        """On so many devices."""
        return context_size * (1 + cdiv(self.rows * self.buckets().pages[0], context_size))  # 1: the scratch page


class _AlwaysWithChunks(batch.Buckets):
    def shapes(self) -> list[batch.StepShape]:
        return [shape for shape in super().shapes() if shape.chunk_tokens]

    def shape(self, plan: StepPlan) -> batch.StepShape:
        (shape,) = self.shapes()
        assert shape.rows
        return shape


def read_config(model_dir: pathlib.Path) -> ModelConfig:
    hf = HFConfig.read(model_dir)
    return models.for_architecture(hf.architecture).parse_config(hf)


def load(model_dir: pathlib.Path, mesh: str = "", sharding: str = "auto") -> tuple[ModelDefinition, Arrays]:
    """The model in float32 over `mesh`."""
    definition = load_definition(model_dir, mesh, sharding)
    return definition, load_weights(model_dir, definition)


def load_definition(
    model_dir: pathlib.Path, mesh: str = "", sharding: str = "auto", dtype: str = "float32"
) -> ModelDefinition:
    return ModelDefinition.create(read_config(model_dir), Partitioner.create(mesh, sharding), jnp.dtype(dtype))


def make_runner(
    definition: ModelDefinition, weights: Arrays, shapes: Shapes, *, backend: str = "xla", counts_experts: bool = False
) -> Runner:
    """Not compiled yet."""
    spec, buckets = cache_spec(definition, shapes), _buckets(definition, shapes)
    return Runner(definition, weights, spec, buckets, backend=backend, counts_experts=counts_experts)


def step_programs(definition: ModelDefinition, shapes: Shapes, *, backend: str = "xla") -> StepPrograms:
    """To compile and never run."""
    spec, buckets = cache_spec(definition, shapes), _buckets(definition, shapes)
    return StepPrograms(definition=definition, cache_spec=spec, buckets=buckets, backend=backend)


def _buckets(definition: ModelDefinition, shapes: Shapes) -> batch.Buckets:
    return shapes.buckets(definition.partitioner.num_shards(ax.BATCH))


def cache_spec(definition: ModelDefinition, shapes: Shapes) -> kv_cache.CacheSpec:
    return kv_cache.cache_spec(
        definition.decoder_config,
        definition.partitioner,
        pages_per_shard=shapes.pages_per_shard(definition.partitioner.context_size),
        page_size=shapes.page_size,
        dtype=jnp.dtype(shapes.cache_dtype or definition.dtype),
    )


def generate(
    runner: Runner,
    shapes: Shapes,
    prompts: list[list[int]],
    max_tokens: int,
    observe: Callable[[StepPlan], None] = lambda plan: None,
) -> list[list[int]]:
    """Greedy tokens after each prompt, all prompts together. `observe` is called after each step, before its commit."""
    partitioner = runner.definition.partitioner
    sizes = ShardSizes(
        num_shards=partitioner.num_shards(ax.BATCH),
        slots_per_shard=shapes.rows,
        pages_per_shard=shapes.pages_per_shard(partitioner.context_size),
        page_size=shapes.page_size,
        max_model_len=shapes.max_len,
        context_size=partitioner.context_size,
    )
    scheduler = Scheduler(
        sizes, ChunkPolicy(shapes.chunk), decode_steps=shapes.num_steps or 1, enable_prefix_caching=False
    )
    for allocator in scheduler.allocators:
        _shuffle_pages(allocator)
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    requests = [
        Request(
            number=i,
            prompt=None,
            token_ids=[*prompt],
            params=greedy,
            stop_token_ids=(),
            max_tokens=max_tokens,
            seed=0,
            text=OutputText(None, ()),
        )
        for i, prompt in enumerate(prompts)
    ]
    for request in requests:
        scheduler.add(request)
    while (plan := scheduler.schedule()) is not None:
        shape = runner.buckets.shape(plan)
        of_step = batch.build(plan, shape, scheduler.table)
        result = step_result(plan, shape, of_step, runner.dispatch(shape, of_step))
        observe(plan)
        scheduler.commit(plan, result, [])
    return [request.output_token_ids for request in requests]


def generate_on(
    model_dir: pathlib.Path, mesh: str, shapes: Shapes, prompt_lengths: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Greedy tokens after random prompts of these lengths, by programs that can do no more than that."""
    runner = make_runner(*load(model_dir, mesh), shapes)
    with greedy_only():
        runner.compile_all()
    vocab_size = runner.definition.config.vocab_size
    prompts = [recipe.prompt(length, vocab_size, seed) for seed, length in enumerate(prompt_lengths)]
    tokens = generate(runner, shapes, prompts, max_tokens)
    runner.close()
    return tokens


def _shuffle_pages(allocator) -> None:
    """So that a sequence's pages are not neighbours, and a wrong page id is somebody else's page."""
    pages = allocator.allocate(allocator.num_free)
    allocator.free(np.random.RandomState(0).permutation(pages).tolist())


@contextlib.contextmanager
def greedy_only() -> Iterator[None]:
    """Without what samples, which is the same for all families, a model compiles in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplerLowerings, "all", lambda *_: {})
        patch.setattr(steps, "sample", lambda logits, *_, **__: jnp.argmax(logits, axis=-1).astype(jnp.int32))
        yield


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What the engine made of one prompt: greedy `tokens`, and float32 `logits` [prompt + tokens - 1, V]."""

    tokens: list[int]
    logits: np.ndarray


def continue_prompts(
    model_dir: pathlib.Path,
    prompts: list[list[int]],
    num_tokens: int,
    chunk: int = 256,
    num_steps: int = 1,
    *,
    dtype: str = "float32",
    cache_dtype: str | None = None,
    backend: str = "xla",
) -> list[Continuation]:
    """Runs all prompts in one batch on one device, chunk by chunk, and records every logit. Names as of `Shapes`."""
    definition = load_definition(model_dir, dtype=dtype)
    weights = load_weights(model_dir, definition)
    longest = max(map(len, prompts)) + num_tokens
    sizes = {"rows": max(2, len(prompts)), "max_len": longest, "chunk": chunk, "num_steps": num_steps}
    shapes = Shapes(**sizes, cache_dtype=cache_dtype)
    runner, recorder = make_runner(definition, weights, shapes, backend=backend), LogitsRecorder(shapes.chunk)
    with recorder.recording(definition.family.Model):
        runner.compile_all()
    tokens = generate(runner, shapes, prompts, num_tokens, recorder.observe)
    runner.close()
    return [Continuation(t, recorder.logits(i)) for i, t in enumerate(tokens)]


class LogitsRecorder:
    """The logits of every prompt and output position, out of the very programs that serve.

    `recording` wraps the family's model while programs are traced: it computes logits for all positions, where
    the engine wants the last one's only, and calls back to the host with them. For one device.
    """

    def __init__(self, chunk_tokens: int):
        self._chunk_tokens = chunk_tokens  # the last of a step with chunks
        self._steps: list[np.ndarray] = []  # [1, S, V] of each model call since the last `observe`
        self._logits: dict[str, list[np.ndarray]] = {}

    @contextlib.contextmanager
    def recording(self, model: type) -> Iterator[None]:
        original = model.finish

        def finish(module, x):
            hidden = original(module, x)
            record = lambda logits: self._steps.append(np.asarray(logits))  # noqa: E731
            jax.debug.callback(record, module.logits(hidden), ordered=True)
            return hidden

        model.finish = finish
        try:
            yield
        finally:
            model.finish = original

    def observe(self, plan: StepPlan) -> None:
        """Gives what was recorded since the last call to the requests of `plan`."""
        jax.effects_barrier()
        (chunks,), (rows,) = plan.chunks, plan.rows  # one device, one shard
        for row, request in enumerate(rows):
            num_left = _num_left(request, plan.starts[0][row])
            self._take(request, np.stack([step[0, row] for step in self._steps])[:num_left])
        if chunks:
            (step,) = self._steps
            start = step.shape[1] - self._chunk_tokens
            for chunk in chunks:
                self._take(chunk.request, step[0, start : start + chunk.num_tokens])
                start += chunk.num_tokens
        self._steps.clear()

    def logits(self, request_id: int) -> np.ndarray:
        """float32 [prompt + output - 1, V] of the request at this place in the list of prompts."""
        return np.concatenate(self._logits[str(request_id)])

    def _take(self, request: Request, logits: np.ndarray) -> None:
        self._logits.setdefault(request.request_id, []).append(logits)


def _num_left(request: Request, start: int) -> int:
    """Tokens that may still be generated after position `start`."""
    return request.max_num_tokens - 1 - start
