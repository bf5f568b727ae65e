"""Another scheduler over an engine's compiled programs: to schedule otherwise without compiling again."""

from jaxinfer import Engine
from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.engine_core import EngineCore
from jaxinfer.scheduler import Scheduler
from jaxinfer.shard import ShardSizes
from jaxinfer.stats import EngineStats


def fresh_core(
    engine: Engine, *, chunk: int, prefix: bool, decode_steps: int, pages_per_shard: int | None = None
) -> EngineCore:
    """`chunk` is the budget of tokens per step, `prefix` whether pages are shared; None: as many pages as there are."""
    runner, resolved = engine._core.runner, engine.resolved
    sizes = ShardSizes(
        num_shards=runner.buckets.num_shards,
        slots_per_shard=resolved.slots_per_shard,
        pages_per_shard=pages_per_shard or resolved.memory.pages_per_shard,
        page_size=resolved.memory.page_size,
        max_model_len=resolved.max_model_len,
        context_size=resolved.memory.context_size,
    )
    scheduler = Scheduler(
        sizes, ChunkPolicy(chunk, runner.buckets.chunk_tokens), decode_steps=decode_steps, enable_prefix_caching=prefix
    )
    return EngineCore(scheduler, runner, EngineStats())
