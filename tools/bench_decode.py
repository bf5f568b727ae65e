"""Measures decoding against the memory's bandwidth, and against other engines in the same run.

    python tools/bench_decode.py                                             # 254 M parameters, float32, CPU
    python tools/bench_decode.py --batch_sizes=1 --prompt_tokens=32,512,2048 # over context; prefill is measured too
    python tools/bench_decode.py --peers=hf,hf_compiled,llama_cpp            # all that bench_peer.py knows
    python tools/bench_decode.py --shape=8b --dtype=bfloat16 --peers=        # the size of Llama 3 8B, on a GPU

A decode step multiplies every weight with one vector per sequence, so at small batches it is as fast as memory is
read, and the ceiling is

    steps/s <= bandwidth / (bytes of the weights + bytes of the cache in use)

where an embedding that is not also the head does not count: one row of it is read. The bandwidth is measured on the
same device between the rounds, because other programs may take a part of it.

Decoding is timed from the first token on and prefill until then, the host's work between the steps included. Ours is
the path that the engine takes: scheduler, batch, runner, the host a step behind. All have the same weights, prompts
and dtype and choose greedily. Rounds alternate between them and the figure is the median of the rounds' ratios, which
a busy machine moves less than any speed.
"""

import itertools
import math
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from absl import app, flags

from jaxinfer.bandwidth import measure_read_bandwidth
from jaxinfer.checkpoint.hf_reader import load_weights
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.tools import bench_models, bench_ours, bench_peer, bench_record
from jaxinfer.tools.bench_peer import Generate, Generated, Setting

_MODEL = flags.DEFINE_string("model", None, "Hugging Face model directory; without it, random weights of --shape.")
_SHAPE = flags.DEFINE_enum("shape", "254m", list(bench_models.SHAPES), "Which random Llama.")
_LAYERS = flags.DEFINE_integer("layers", None, "Layers, instead of the shape's.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of weights and cache.")
_PEERS = flags.DEFINE_list("peers", ["hf"], f"Any of {', '.join(bench_peer.PEERS)}; empty for none.")
_PEER_THREADS = flags.DEFINE_list("peer_threads", ["0", "1"], "All are run and the fastest counts; 0: its own choice.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Sequences that decode together.")
_PROMPT_TOKENS = flags.DEFINE_list("prompt_tokens", ["32"], "Lengths of the random prompts.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Timed tokens per sequence and round.", lower_bound=1)
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", 8, "Tokens per sequence and dispatch.", lower_bound=1)
_ATTENTION = flags.DEFINE_string("attention_backend", "auto", "A backend in pallas_kernels/paged_attention/.")

Contender = tuple[str, int, Generate]  # a peer with a number of threads


def compare(definition: ModelDefinition, setting: Setting, ours: Generate, peers: list[Contender]) -> dict[str, Any]:
    """Alternating rounds of one setting; prints and returns the figures."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, definition.config.vocab_size, (setting.batch_size, setting.prompt_tokens)).tolist()
    generates = [ours, *(generate for _, _, generate in peers)]
    warm_up = [generate(prompts) for generate in generates]
    rounds, bandwidths = [], []
    for _ in range(_ROUNDS.value):
        rounds.append([generate(prompts) for generate in generates])
        bandwidths.append(measure_read_bandwidth(jax.devices()[0]))
    result = _of_ours(definition, setting, [of_round[0] for of_round in rounds], bandwidths)
    for name, group in itertools.groupby(enumerate(peers, start=1), key=lambda entry: entry[1][0]):
        places = {threads: place for place, (_, threads, _) in group}
        threads = min(places, key=lambda n: np.median([of_round[places[n]].decode_s for of_round in rounds]))
        pairs = [(of_round[0], of_round[places[threads]]) for of_round in rounds]
        found: dict[str, Any] = _of_peer(pairs) | {"threads": threads}
        equal = bench_peer.count_equal(warm_up[0].tokens, warm_up[places[threads]].tokens)
        result[name] = found | {"equal_tokens": equal, "compared_tokens": setting.batch_size * (1 + setting.new_tokens)}
        low, high = found["decode_ratio_iqr"]
        print(
            f"  {name}, threads {threads}: ours decodes {found['decode_ratio']:.2f} times as fast "
            f"(middle half of the rounds {low:.2f} to {high:.2f}) and prefills {found['prefill_ratio']:.2f} times; "
            f"{equal} of {result[name]['compared_tokens']} tokens equal",
            flush=True,
        )
    return result


def _of_ours(
    definition: ModelDefinition, setting: Setting, rounds: list[Generated], bandwidths: list[float]
) -> dict[str, Any]:
    decode_s, prefill_s = (np.array([getattr(found, name) for found in rounds]) for name in ("decode_s", "prefill_s"))
    step_bytes = bench_ours.step_bytes(definition, setting)
    achieved = step_bytes * setting.new_tokens / decode_s
    result: dict[str, Any] = {
        "batch_size": setting.batch_size,
        "prompt_tokens": setting.prompt_tokens,
        "tokens_per_s": setting.batch_size * setting.new_tokens / np.median(decode_s),
        "prefill_tokens_per_s": setting.batch_size * setting.prompt_tokens / np.median(prefill_s),
        "step_bytes": step_bytes,
        "achieved_gb_per_s": np.median(achieved) / 1e9,
        "bandwidth_gb_per_s": np.median(bandwidths) / 1e9,
        "bandwidth_share": np.median(achieved / np.array(bandwidths)),
    }
    print(
        f"batch {setting.batch_size}, prompts of {setting.prompt_tokens}: {result['tokens_per_s']:.1f} tokens/s, "
        f"{result['achieved_gb_per_s']:.1f} of {result['bandwidth_gb_per_s']:.1f} GB/s "
        f"({result['bandwidth_share']:.0%}); prefill {result['prefill_tokens_per_s']:.0f} tokens/s",
        flush=True,
    )
    return result


def _of_peer(pairs: list[tuple[Generated, Generated]]) -> dict[str, Any]:
    """Of each round's seconds, how often ours go into the peer's."""
    found = {}
    for name in ("decode", "prefill"):
        ratios = [getattr(peer, f"{name}_s") / getattr(ours, f"{name}_s") for ours, peer in pairs]
        low, ratio, high = np.percentile(ratios, (25, 50, 75)).tolist()
        found |= {f"{name}_ratio": ratio, f"{name}_ratio_iqr": [low, high]}
    return found


def _load(directory: pathlib.Path) -> tuple[pathlib.Path, ModelDefinition, tuple[jax.Array, ...]]:
    """The model; it is written to `directory` if peers are to read it."""
    config = bench_models.hf_config(_SHAPE.value, _LAYERS.value)
    model_dir = pathlib.Path(_MODEL.value or directory / "model")
    definition = bench_models.define(HFConfig.read(model_dir) if _MODEL.value else HFConfig(config), _DTYPE.value)
    if _MODEL.value:
        return model_dir, definition, load_weights(model_dir, definition)
    if _PEERS.value:
        return model_dir, definition, bench_models.write_random(model_dir, config, _DTYPE.value)
    return model_dir, definition, definition.init()


def main(argv: list[str]) -> None:
    del argv
    try:
        bench_peer.check(_PEERS.value)
    except ValueError as error:
        raise app.UsageError(f"--peers={','.join(_PEERS.value)}: {error}") from None
    results = []
    with tempfile.TemporaryDirectory() as directory:
        model_dir, definition, weights = _load(pathlib.Path(directory))
        num_params = sum(math.prod(spec.shape) for spec in definition.params)
        print(f"{num_params / 1e6:.0f} M parameters, {definition.weight_bytes / 1e9:.2f} GB of {_DTYPE.value}")
        for batch_size, tokens in itertools.product(map(int, _BATCH_SIZES.value), map(int, _PROMPT_TOKENS.value)):
            setting = Setting(model_dir, _DTYPE.value, batch_size, tokens, _NEW_TOKENS.value)
            ours = bench_ours.make(definition, weights, setting, _DECODE_STEPS.value, _ATTENTION.value)
            peers = [*bench_peer.make(_PEERS.value, setting, map(int, _PEER_THREADS.value))]
            results.append(compare(definition, setting, ours, peers))
    run = bench_record.describe_run("bench_decode", bench_peer.packages(_PEERS.value))
    bench_record.print_record(run | {"num_params": num_params, "dtype": _DTYPE.value, "results": results})


if __name__ == "__main__":
    app.run(main)
