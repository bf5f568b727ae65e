"""One family's tiny model on many meshes, scheduled in every way: for tools/parallel_matrix.py."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import batch, kv_cache, models
from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.config import ModelConfig
from jaxinfer.engine_core import EngineCore
from jaxinfer.hf_config import HFConfig
from jaxinfer.integers import cdiv
from jaxinfer.output_text import OutputText
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.request import Request
from jaxinfer.runner import Runner
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduler import Scheduler
from jaxinfer.shard import ShardSizes
from jaxinfer.stats import EngineStats
from jaxinfer.step_plan import StepPlan
from sharding_rules import axes as ax

_SLOTS, _PAGE_SIZE, _MAX_LEN, _CHUNK, _DECODE_STEPS = 8, 16, 192, 64, 4
_STEM, _PROMPT_LENGTHS, _NUM_TOKENS = 40, (5, 140, 33, 64, 17, 70, 66, 61, 90), 40  # tokens; 140 is beyond all windows
_GAIN = 5.0  # on random weights, so that attention picks and text varies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How requests are scheduled, and how that can be seen.

    Attributes:
      chunk: most tokens of a step in a data shard.
      prefix: whether pages are shared by requests that start alike.
      decode_steps: tokens of a row and dispatch.
      is_starved: whether a data shard has pages for one longest sequence only.
    """

    chunk: int = _CHUNK + _SLOTS
    prefix: bool = False
    decode_steps: int = 1
    is_starved: bool = False


SCHEDULES = {
    "chunked prefill": Schedule(chunk=20),
    "prefix cache": Schedule(prefix=True),
    "preemption": Schedule(is_starved=True),
    "several steps per dispatch": Schedule(decode_steps=_DECODE_STEPS),
}


class FamilyRuns:
    """Holds the random weights of a family's first tiny config, and what it generates on one device."""

    def __init__(self, family: str):
        hf_config = next(iter(models.get(family).TINY_CONFIGS.values()))
        self.config: ModelConfig = models.get(family).parse_config(HFConfig(hf_config))
        definition = self._definition("", "auto")
        self._weights = [np.asarray(_GAIN * array) for array in definition.init(seed=0)]
        prompts = np.random.RandomState(0).randint(
            0, self.config.vocab_size, (len(_PROMPT_LENGTHS), max(_PROMPT_LENGTHS))
        )
        prompts[1::2, :_STEM] = prompts[1, :_STEM]
        self._prompts = [row[:n].tolist() for row, n in zip(prompts, _PROMPT_LENGTHS, strict=True)]
        runner = self._runner(definition)
        self._expected = []
        for request in self._requests():  # each by itself
            self._expected += _generate(_core(runner, Schedule()), [request])[0]
        runner.close()

    def outcomes(self, mesh: str, sharding: str) -> dict[str, tuple[str, str]]:
        """By feature "equal", "refused" or "failed", and why."""
        try:
            definition = self._definition(mesh, sharding)
        except ValueError as error:
            return dict.fromkeys(SCHEDULES, ("refused", str(error)))
        try:
            runner = self._runner(definition)
        except Exception as error:  # what is accepted has to compile
            return dict.fromkeys(SCHEDULES, ("failed", f"{type(error).__name__}: {error}"))
        outcomes = {name: self._outcome(runner, name) for name in SCHEDULES}
        runner.close()
        return outcomes

    def _outcome(self, runner: Runner, feature: str) -> tuple[str, str]:
        core = _core(runner, SCHEDULES[feature])
        try:
            found, seen = _generate(core, self._requests())
        except Exception as error:  # whatever it is, the others shall run
            return "failed", f"{type(error).__name__}: {error}"
        for number, (tokens, wanted) in enumerate(zip(found, self._expected, strict=True)):
            if tokens != wanted:
                pairs = enumerate(zip(tokens, wanted, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), len(tokens))
                return "failed", f"output {number} differs from token {at} on: {tokens} and not {wanted}"
        return ("equal", "") if feature in seen else ("failed", f"there was no {feature}")

    def _requests(self) -> list[Request]:
        params = SamplingParams(temperature=0.0, max_tokens=_NUM_TOKENS)
        return [
            Request(
                number=number,
                prompt=None,
                token_ids=[*prompt],
                params=params,
                stop_token_ids=(),
                max_tokens=_NUM_TOKENS,
                seed=0,
                text=OutputText(None, ()),
            )
            for number, prompt in enumerate(self._prompts)
        ]

    def _definition(self, mesh: str, sharding: str) -> ModelDefinition:
        return ModelDefinition.create(self.config, Partitioner.create(mesh, sharding), jnp.dtype("float32"))

    def _runner(self, definition: ModelDefinition) -> Runner:
        partitioner = definition.partitioner
        weights = tuple(
            jax.device_put(spec.repeat(jnp.asarray(array)), spec.sharding)
            for spec, array in zip(definition.params, self._weights, strict=True)
        )
        num_pages = cdiv(_MAX_LEN, _PAGE_SIZE)
        num_shards = partitioner.num_shards(ax.BATCH)
        rows = _SLOTS // num_shards
        sizes = ((rows,), (num_pages,), (num_pages,), (_CHUNK,))
        spec = kv_cache.cache_spec(
            self.config,
            partitioner,
            pages_per_shard=_pages_per_shard(partitioner, rows * num_pages),
            page_size=_PAGE_SIZE,
            dtype=definition.dtype,
        )
        buckets = batch.Buckets(*sizes, _PAGE_SIZE, _DECODE_STEPS, num_shards)
        runner = Runner(definition, weights, spec, buckets, backend="xla")
        runner.compile_all(extras=False)
        return runner


def _pages_per_shard(partitioner: Partitioner, num_usable: int) -> int:
    """Of a data shard, scratch pages included."""
    return partitioner.context_size * (1 + cdiv(num_usable, partitioner.context_size))


def _core(runner: Runner, schedule: Schedule) -> EngineCore:
    partitioner, rows = runner.definition.partitioner, runner.buckets.rows[-1]
    num_pages = runner.buckets.pages[-1] * (1 if schedule.is_starved else rows)
    sizes = ShardSizes(
        num_shards=runner.buckets.num_shards,
        slots_per_shard=rows,
        pages_per_shard=_pages_per_shard(partitioner, num_pages),
        page_size=_PAGE_SIZE,
        max_model_len=_MAX_LEN,
        context_size=partitioner.context_size,
    )
    scheduler = Scheduler(
        sizes,
        ChunkPolicy(schedule.chunk, runner.buckets.chunk_tokens),
        decode_steps=schedule.decode_steps,
        enable_prefix_caching=schedule.prefix,
    )
    return EngineCore(scheduler, runner, EngineStats())


def _generate(core: EngineCore, requests: list[Request]) -> tuple[list[list[int]], set[str]]:
    """What each generates, and the features that were seen at work."""
    most_steps, most_pieces = 0, Counter()
    plan_step = core.scheduler.schedule

    def schedule() -> StepPlan | None:
        nonlocal most_steps
        if plan := plan_step():
            most_steps = max(most_steps, plan.num_steps)
            most_pieces.update(chunk.request.number for chunks in plan.chunks for chunk in chunks)
        return plan

    core.scheduler.schedule = schedule
    for request in requests:
        core.scheduler.add(request)
    while core.has_work:
        core.step()
        core.scheduler.check()
    was_seen = {
        "chunked prefill": max(most_pieces.values()) > 1,
        "prefix cache": core.scheduler.stats.cached_prompt_tokens > 0,
        "preemption": core.scheduler.num_preemptions > 0,
        "several steps per dispatch": most_steps == _DECODE_STEPS,
    }
    return [request.output_token_ids for request in requests], {name for name in was_seen if was_seen[name]}
