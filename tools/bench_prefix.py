"""Measures what the prefix cache brings where prompts begin alike, and what it costs where they do not.

    python tools/bench_prefix.py                     # 61 M parameters, float32, CPU

Two engines alternate, with the cache and without, and have the same requests, new ones in each round:

    shared 0%, 50%, 90%   requests that come all at once and have so much of their prompts in common: requests/s
    turns                 conversations whose prompts are all that was said before: seconds until all are over
    first token           of a prompt that was asked before, beside one that was not: with the cache alone

All generate greedily. The figure is the median of the rounds' ratios; all tokens are compared.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import app, flags

from jaxinfer import Engine, SamplingParams
from jaxinfer.tools import bench_models, bench_record

_SHAPE = flags.DEFINE_enum("shape", "61m", list(bench_models.SHAPES), "Which random Llama.")
_LAYERS = flags.DEFINE_integer("layers", None, "Layers, instead of the shape's.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of weights and cache.")
_SHARED = flags.DEFINE_list("shared", ["0", "0.5", "0.9"], "Shares of the prompts that all of a round have in common.")
_REQUESTS = flags.DEFINE_integer("requests", 32, "Requests of a round.", lower_bound=1)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 512, "Of a request.", lower_bound=2)
_OUTPUT_TOKENS = flags.DEFINE_integer("output_tokens", 16, "Of a request.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 4, "Of a conversation; a prompt is told in as many parts.", lower_bound=2)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Slots of the engine, and conversations.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each.", lower_bound=1)

Prompts = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The engine with the cache and the one without."""

    engines: tuple[Engine, Engine]
    vocab_size: int
    rng: np.random.Generator
    orders: Iterator[tuple[int, int]] = dataclasses.field(default_factory=lambda: itertools.cycle([(0, 1), (1, 0)]))

    def random_tokens(self, *shape: int) -> Any:
        return self.rng.integers(0, self.vocab_size, shape).tolist()

    def ratios(self, prompts: Prompts, run: Any) -> tuple[float, list[float]]:
        """How often the first's seconds go into the second's; and both. They take turns in going first."""
        seconds, tokens = [0.0, 0.0], [[], []]
        for i in next(self.orders):
            start = time.perf_counter()
            tokens[i] = run(self.engines[i], prompts)
            seconds[i] = time.perf_counter() - start
        if tokens[0] != tokens[1]:
            raise AssertionError("with the prefix cache other tokens come out than without")
        return seconds[1] / seconds[0], seconds


def generate(engine: Engine, prompts: Prompts) -> Prompts:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=_OUTPUT_TOKENS.value)
    return [output.outputs[0].token_ids for output in engine.generate(prompts, params)]


def converse(engine: Engine, said: Prompts) -> Prompts:
    """A conversation for each of `said`: its parts one after the other, with the engine's answers between them."""
    part = len(said[0]) // _TURNS.value
    heard: Prompts = [[] for _ in said]
    for turn in range(_TURNS.value):
        heard = [before + tokens[turn * part : (turn + 1) * part] for before, tokens in zip(heard, said, strict=True)]
        heard = [before + answer for before, answer in zip(heard, generate(engine, heard), strict=True)]
    return heard


def measure_throughput(pair: Pair, shared: float) -> dict[str, Any]:
    rounds = []
    for _ in range(1 + _ROUNDS.value):
        num_shared = int(_PROMPT_TOKENS.value * shared)
        stem = pair.random_tokens(num_shared)
        own = pair.random_tokens(_REQUESTS.value, _PROMPT_TOKENS.value - num_shared)
        rounds.append(pair.ratios([stem + tokens for tokens in own], generate))
    found = _summary(rounds[1:]) | {"shared": shared}
    found["requests_per_s"] = _REQUESTS.value / found["seconds"]
    print(f"shared {shared:.0%}: {found['requests_per_s']:.1f} requests/s, {_told(found)}", flush=True)
    return found


def measure_turns(pair: Pair) -> dict[str, Any]:
    tokens = [pair.random_tokens(_BATCH_SIZE.value, _PROMPT_TOKENS.value) for _ in range(1 + _ROUNDS.value)]
    found = _summary([pair.ratios(said, converse) for said in tokens][1:])
    print(f"{_TURNS.value} turns: {found['seconds']:.2f} s, {_told(found)}", flush=True)
    return found


def measure_first_token(engine: Engine, pair: Pair) -> dict[str, float]:
    """Of a new prompt, and of the same again."""

    def seconds(prompt: list[int]) -> float:
        (output,) = engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1))
        assert output.metrics.ttft_s is not None
        return output.metrics.ttft_s

    prompts = [pair.random_tokens(_PROMPT_TOKENS.value) for _ in range(1 + _ROUNDS.value)]
    misses, hits = zip(*((seconds(prompt), seconds(prompt)) for prompt in prompts), strict=True)
    ratio = statistics.median(hit / miss for hit, miss in zip(hits[1:], misses[1:], strict=True))
    found = {"miss_s": statistics.median(misses[1:]), "hit_s": statistics.median(hits[1:]), "ratio": ratio}
    print(f"first token: {found['hit_s']:.3f} s, {ratio:.2f} of what it takes for a new prompt", flush=True)
    return found


def _summary(rounds: list[tuple[float, list[float]]]) -> dict[str, Any]:
    ratios = [ratio for ratio, _ in rounds]
    seconds = statistics.median(with_cache for _, (with_cache, _) in rounds)
    return {"ratio": statistics.median(ratios), "ratios": ratios, "seconds": seconds}


def _told(found: dict[str, Any]) -> str:
    low, high = min(found["ratios"]), max(found["ratios"])
    return f"{found['ratio']:.2f} times as fast as without the cache (rounds {low:.2f} to {high:.2f})"


def main(argv: list[str]) -> None:
    del argv
    config = bench_models.hf_config(_SHAPE.value, _LAYERS.value)
    with contextlib.ExitStack() as stack:
        model_dir = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        bench_models.write_random(model_dir, config, _DTYPE.value)
        fields = {
            "dtype": _DTYPE.value,
            "max_model_len": _PROMPT_TOKENS.value + (_TURNS.value + 1) * _OUTPUT_TOKENS.value,
            "max_num_seqs": _BATCH_SIZE.value,
        }
        with_cache, without = (
            stack.enter_context(Engine(str(model_dir), enable_prefix_caching=has_cache, **fields))
            for has_cache in (True, False)
        )
        pair = Pair((with_cache, without), config["vocab_size"], np.random.default_rng(0))
        results = {
            "throughput": [measure_throughput(pair, float(shared)) for shared in _SHARED.value],
            "turns": measure_turns(pair),
            "first_token": measure_first_token(with_cache, pair),
        }
    workload = {flag.name: flag.value for flag in (_SHAPE, _DTYPE, _REQUESTS, _PROMPT_TOKENS, _OUTPUT_TOKENS, _TURNS)}
    bench_record.print_record(bench_record.describe_run("bench_prefix") | workload | {"results": results})


if __name__ == "__main__":
    app.run(main)
