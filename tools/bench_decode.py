"""Measures decoding against the memory's bandwidth, and against Hugging Face transformers in the same run.

    python tools/bench_decode.py                                            # 254 M parameters, float32, CPU
    python tools/bench_decode.py --shape=8b --dtype=bfloat16 --peer=none    # the size of Llama 3 8B, on a GPU

A decode step multiplies every weight with one vector per sequence, so at small batches it is as fast as memory is
read, and the ceiling is

    steps/s <= bandwidth / (bytes of the weights + bytes of the cache in use)

where an embedding that is not also the head does not count: one row of it is read. The bandwidth is measured on the
same device between the rounds, because other programs may take a part of it.

Only decoding is timed, from the first token on, the host's work between the steps included. Ours is the path that the
engine takes: scheduler, batch, runner, the host a step behind. The peer's is the usual loop over
`model(token, past_key_values=cache)` with its default attention. Both have the same weights, prompts and dtype and
choose greedily. Rounds alternate between them and the figure is the median of the rounds' ratios, which a busy machine
moves less than either speed. On a busy machine torch can be several times faster with one thread than with its own
choice, so it gets whichever is best.
"""

import itertools
import math
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from absl import app, flags

from jaxinfer import kv_cache, planner
from jaxinfer.attention import attention_specs
from jaxinfer.bandwidth import measure_read_bandwidth
from jaxinfer.batch import Buckets
from jaxinfer.checkpoint.hf_reader import load_weights
from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.engine_core import EngineCore
from jaxinfer.hf_config import HFConfig
from jaxinfer.output_text import OutputText
from jaxinfer.parameters import ModelDefinition
from jaxinfer.request import Request
from jaxinfer.runner import Runner
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduler import Scheduler
from jaxinfer.shard import ShardSizes
from jaxinfer.stats import EngineStats
from jaxinfer.tools import bench_models, bench_peer, bench_record
from jaxinfer.tools.bench_peer import Generate
from pallas_kernels import paged_attention

_MODEL = flags.DEFINE_string("model", None, "Hugging Face model directory; without it, random weights of --shape.")
_SHAPE = flags.DEFINE_enum("shape", "254m", list(bench_models.SHAPES), "Which random Llama.")
_LAYERS = flags.DEFINE_integer("layers", None, "Layers, instead of the shape's.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of weights and cache.")
_PEER = flags.DEFINE_enum("peer", "hf", ["hf", "none"], "hf runs transformers beside ours; it needs torch.")
_PEER_THREADS = flags.DEFINE_list("peer_threads", ["0", "1"], "All are run and the fastest counts; 0: torch decides.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Sequences that decode together.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each.", lower_bound=1)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "Length of the random prompts.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Timed tokens per sequence and round.", lower_bound=1)
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", 8, "Tokens per sequence and dispatch.", lower_bound=1)
_ATTENTION = flags.DEFINE_string("attention_backend", "auto", "A backend in pallas_kernels/paged_attention/.")


def make_ours(definition: ModelDefinition, weights: tuple[jax.Array, ...], batch_size: int, num_steps: int) -> Generate:
    """The engine without text: one compiled shape per kind of step."""
    max_tokens = _NEW_TOKENS.value + batch_size  # the first of each, and those beside the prefill of the others
    page_size = 16 if jax.default_backend() == "cpu" else 64
    context = max(128, 1 << (_PROMPT_TOKENS.value + max_tokens - 1).bit_length())  # a bucket that the engine has
    pages = (context // page_size,)
    pages_per_shard = 1 + batch_size * pages[0]
    buckets = Buckets((batch_size,), pages, pages, (_PROMPT_TOKENS.value,), page_size, num_steps, num_shards=1)
    cache = kv_cache.cache_spec(
        definition.decoder_config,
        definition.partitioner,
        pages_per_shard=pages_per_shard,
        page_size=page_size,
        dtype=definition.dtype,
    )
    specs = itertools.chain.from_iterable(attention_specs(definition.decoder_config, definition.partitioner, page_size))
    attention = paged_attention.resolve(_ATTENTION.value, specs, definition.partitioner.device)
    runner = Runner(definition, weights, cache, buckets, backend=attention.name)
    runner.compile_all(extras=False)
    params = SamplingParams(temperature=0.0, ignore_eos=True)

    def generate(prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        sizes = ShardSizes(
            num_shards=1,
            slots_per_shard=batch_size,
            pages_per_shard=pages_per_shard,
            page_size=page_size,
            max_model_len=context,
        )
        scheduler = Scheduler(
            sizes,
            ChunkPolicy(_PROMPT_TOKENS.value + batch_size, buckets.chunk_tokens),
            decode_steps=num_steps,
            enable_prefix_caching=False,
        )
        core = EngineCore(scheduler, runner, stats := EngineStats())
        requests = [
            Request(
                number=i,
                prompt=None,
                token_ids=[*prompt],
                params=params,
                stop_token_ids=(),
                max_tokens=max_tokens - i,  # so that all have as many to go when the last is prefilled
                seed=0,
                text=OutputText(None, ()),
            )
            for i, prompt in enumerate(prompts)
        ]
        for request in requests:
            scheduler.add(request)
        while core.has_work:
            core.step()
        return [request.output_token_ids[: 1 + _NEW_TOKENS.value] for request in requests], stats.decode_s

    return generate


def step_bytes(definition: ModelDefinition, batch_size: int) -> int:
    """Bytes that a decode step must read, with the cache half way between the first step and the last."""
    config, partitioner = definition.decoder_config, definition.partitioner
    ((spec, *_), *_), itemsize = attention_specs(config, partitioner, page_size=1), definition.dtype.itemsize
    token_bytes = planner.page_bytes(num_layers=config.num_layers, token_bytes=spec.token_bytes(itemsize), page_size=1)
    return definition.step_shard_bytes + batch_size * (_PROMPT_TOKENS.value + _NEW_TOKENS.value // 2) * token_bytes


def compare(definition: ModelDefinition, batch_size: int, ours: Generate, peers: list[Generate]) -> dict[str, Any]:
    """Alternating rounds at one batch size; prints and returns the figures. The fastest of `peers` counts."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, definition.config.vocab_size, (batch_size, _PROMPT_TOKENS.value)).tolist()
    our_tokens, peer_tokens = ours(prompts)[0], [peer(prompts)[0] for peer in peers]  # the warm-up too
    num_tokens, num_bytes = batch_size * _NEW_TOKENS.value, step_bytes(definition, batch_size) * _NEW_TOKENS.value
    our_s, peers_s, bandwidth = [], [], []
    for _ in range(_ROUNDS.value):
        our_s.append(ours(prompts)[1])
        peers_s.append([peer(prompts)[1] for peer in peers])
        bandwidth.append(measure_read_bandwidth(jax.devices()[0]))
    achieved = num_bytes / np.array(our_s)
    result: dict[str, Any] = {
        "batch_size": batch_size,
        "tokens_per_s": num_tokens / np.median(our_s),
        "step_bytes": num_bytes // _NEW_TOKENS.value,
        "achieved_gb_per_s": np.median(achieved) / 1e9,
        "bandwidth_gb_per_s": np.median(bandwidth) / 1e9,
        "bandwidth_share": np.median(achieved / np.array(bandwidth)),
    }
    print(
        f"batch {batch_size}: {result['tokens_per_s']:.1f} tokens/s, {result['achieved_gb_per_s']:.1f} of "
        f"{result['bandwidth_gb_per_s']:.1f} GB/s ({result['bandwidth_share']:.0%})"
    )
    if peers:
        fastest = int(np.argmin(np.median(peers_s, axis=0)))
        peer_s = np.array(peers_s)[:, fastest]
        low, ratio, high = np.percentile(peer_s / np.array(our_s), (25, 50, 75))
        equal, total = bench_peer.count_equal(our_tokens, peer_tokens[fastest]), sum(map(len, our_tokens))
        result |= {"peer_tokens_per_s": num_tokens / np.median(peer_s), "peer_threads": _PEER_THREADS.value[fastest]}
        result |= {"ratio": ratio, "ratio_iqr": [low, high], "equal_tokens": equal, "compared_tokens": total}
        print(
            f"  transformers, threads {result['peer_threads']}: {result['peer_tokens_per_s']:.1f} tokens/s; ours is "
            f"{ratio:.2f} times as fast (middle half of the rounds {low:.2f} to {high:.2f}); "
            f"{equal} of {total} tokens equal"
        )
    return result


def main(argv: list[str]) -> None:
    del argv
    hf_config = bench_models.hf_config(_SHAPE.value, _LAYERS.value)
    hf = HFConfig.read(pathlib.Path(_MODEL.value)) if _MODEL.value else HFConfig(hf_config)
    definition = bench_models.define(hf, _DTYPE.value)
    num_params = sum(math.prod(spec.shape) for spec in definition.params)
    print(f"{num_params / 1e6:.0f} M parameters, {definition.weight_bytes / 1e9:.2f} GB of {_DTYPE.value}")
    with tempfile.TemporaryDirectory() as directory:
        if _MODEL.value:
            model_dir = pathlib.Path(_MODEL.value)
            weights = load_weights(model_dir, definition)
        else:
            model_dir = pathlib.Path(directory) / "model"
            has_peer = _PEER.value == "hf"
            weights = bench_models.write_random(model_dir, hf_config, _DTYPE.value) if has_peer else definition.init()
        peers = []
        if _PEER.value == "hf":
            make_peer = bench_peer.make_peer(model_dir, _DTYPE.value, _NEW_TOKENS.value)
            peers = [make_peer(int(num_threads)) for num_threads in _PEER_THREADS.value]
    results = []
    for batch_size in map(int, _BATCH_SIZES.value):
        ours = make_ours(definition, weights, batch_size, _DECODE_STEPS.value)
        results.append(compare(definition, batch_size, ours, peers))
    run = bench_record.describe_run("bench_decode", bench_peer.PACKAGES if _PEER.value == "hf" else ())
    bench_record.print_record(run | {"num_params": num_params, "dtype": _DTYPE.value, "results": results})


if __name__ == "__main__":
    app.run(main)
