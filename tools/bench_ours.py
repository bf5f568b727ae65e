"""This engine as the benchmarks of decoding run it: scheduler, batch, runner, the host a step behind; no text."""

import functools
import itertools

import jax

from jaxinfer import kv_cache, planner
from jaxinfer.attention import attention_specs
from jaxinfer.batch import Buckets
from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.engine_core import EngineCore
from jaxinfer.output_text import OutputText
from jaxinfer.parameters import ModelDefinition
from jaxinfer.request import Request
from jaxinfer.runner import Runner
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduler import Scheduler
from jaxinfer.shard import ShardSizes
from jaxinfer.stats import EngineStats
from jaxinfer.tools.bench_peer import Generate, Generated, Setting
from pallas_kernels import paged_attention

_SMALLEST_CONTEXT = 128  # a bucket that the engine has
_CHUNK_TOKENS = 512  # that the engine prefills in a step, unless it is told otherwise
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def make(
    definition: ModelDefinition, weights: tuple[jax.Array, ...], setting: Setting, num_steps: int, attention: str
) -> Generate:
    """Greedy, `num_steps` tokens per dispatch; of each kind of step it compiles the one shape that is needed."""
    together = max(1, min(setting.batch_size, _CHUNK_TOKENS // setting.prompt_tokens))  # prompts of a step
    most_tokens = _max_tokens(setting, together, 0)
    context = max(_SMALLEST_CONTEXT, 1 << (setting.prompt_tokens + most_tokens - 1).bit_length())
    page_size = 16 if jax.default_backend() == "cpu" else 64
    sizes = ShardSizes(
        num_shards=1,
        slots_per_shard=setting.batch_size,
        pages_per_shard=1 + setting.batch_size * context // page_size,
        page_size=page_size,
        max_model_len=context,
    )
    runner = _runner(definition, weights, sizes, together * setting.prompt_tokens, num_steps, attention)
    return functools.partial(_generate, runner, sizes, together, setting)


def step_bytes(definition: ModelDefinition, setting: Setting) -> int:
    """Bytes that a decode step must read, with the cache half way between the first step and the last."""
    config, partitioner = definition.decoder_config, definition.partitioner
    ((spec, *_), *_), itemsize = attention_specs(config, partitioner, page_size=1), definition.dtype.itemsize
    token_bytes = planner.page_bytes(num_layers=config.num_layers, token_bytes=spec.token_bytes(itemsize), page_size=1)
    tokens = setting.batch_size * (setting.prompt_tokens + setting.new_tokens // 2)
    return definition.step_shard_bytes + tokens * token_bytes


def _runner(
    definition: ModelDefinition,
    weights: tuple[jax.Array, ...],
    sizes: ShardSizes,
    chunk_tokens: int,
    num_steps: int,
    attention: str,
) -> Runner:
    config, partitioner, page_size = definition.decoder_config, definition.partitioner, sizes.page_size
    pages = (sizes.max_model_len // page_size,)
    buckets = Buckets((sizes.slots_per_shard,), pages, pages, (chunk_tokens,), page_size, num_steps, num_shards=1)
    cache = kv_cache.cache_spec(
        config, partitioner, pages_per_shard=sizes.pages_per_shard, page_size=page_size, dtype=definition.dtype
    )
    specs = itertools.chain.from_iterable(attention_specs(config, partitioner, page_size))
    backend = paged_attention.resolve(attention, specs, partitioner.device).name
    runner = Runner(definition, weights, cache, buckets, backend=backend)
    runner.compile_all(extras=False)
    return runner


def _max_tokens(setting: Setting, together: int, index: int) -> int:
    """Of a sequence; so that all have as many to go when the last of them is prefilled, beside which others decode."""
    return 1 + setting.new_tokens + (setting.batch_size - 1) // together - index // together


def _generate(
    runner: Runner, sizes: ShardSizes, together: int, setting: Setting, prompts: list[list[int]]
) -> Generated:
    buckets = runner.buckets
    policy = ChunkPolicy(buckets.chunk_tokens[-1] + setting.batch_size, buckets.chunk_tokens)
    scheduler = Scheduler(sizes, policy, decode_steps=buckets.decode_steps, enable_prefix_caching=False)
    core = EngineCore(scheduler, runner, stats := EngineStats())
    requests = [
        Request(
            number=i,
            prompt=None,
            token_ids=[*prompt],
            params=_GREEDY,
            stop_token_ids=(),
            max_tokens=_max_tokens(setting, together, i),
            seed=0,
            text=OutputText(None, ()),
        )
        for i, prompt in enumerate(prompts)
    ]
    for request in requests:
        scheduler.add(request)
    while core.has_work:
        core.step()
    tokens = [request.output_token_ids[: 1 + setting.new_tokens] for request in requests]
    return Generated(tokens, stats.prefill_s, stats.decode_s)
