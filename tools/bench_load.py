"""Measures how long a request waits for its first token while the engine has others to serve.

    python tools/bench_load.py                              # 61 M parameters, float32, CPU
    python tools/bench_load.py --chunk_tokens=64,512        # how much of a prompt a step takes beside rows that decode

Requests arrive one after the other at an `AsyncEngine`, after pauses of random length: with nothing else to do, and
while all slots but one decode. A step has a chunk of the new prompt and a token of each row, so neither stops for the
other; told are the time to the first token, and the longest gap between two tokens of a row, with and without prompts.

Figures are medians of the arrivals, and the ratio that of the rounds' ratios; arrivals idle and under load alternate.
"""

import asyncio
import pathlib
import statistics
import tempfile
import time
from typing import Any

import numpy as np
from absl import app, flags

from jaxinfer import AsyncEngine, SamplingParams
from jaxinfer.tools import bench_models, bench_record

_SHAPE = flags.DEFINE_enum("shape", "61m", list(bench_models.SHAPES), "Which random Llama.")
_LAYERS = flags.DEFINE_integer("layers", None, "Layers, instead of the shape's.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of weights and cache.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 512, "Of a request that arrives.", lower_bound=1)
_CHUNK_TOKENS = flags.DEFINE_list("chunk_tokens", ["512"], "Each an engine's --max_num_batched_tokens.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Slots of the engine.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed arrivals of each kind.", lower_bound=1)
_MOST_PAUSE_S = 0.3
_GENERATED = 2048  # tokens that a row may have; a request's are 1


class Load:
    """Rows that decode until they are stopped, and when each of their tokens came."""

    def __init__(self, engine: AsyncEngine, prompts: list[list[int]]):
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=_GENERATED)
        self._streams = [engine.stream(prompt, params) for prompt in prompts]
        self._tasks = [asyncio.create_task(self._follow(stream)) for stream in self._streams]
        self.gaps: list[float] = []

    async def _follow(self, stream: Any) -> None:
        last = None
        async for _ in stream:
            now = time.perf_counter()
            if last is not None:
                self.gaps.append(now - last)
            last = now

    async def stop(self) -> None:
        for stream in self._streams:
            await stream.aclose()
        await asyncio.gather(*self._tasks)


async def first_token_s(engine: AsyncEngine, prompt: list[int]) -> float:
    start = time.perf_counter()
    async for _ in engine.stream(prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)):
        return time.perf_counter() - start
    raise AssertionError("the request ended without a token")


async def measure(engine: AsyncEngine, vocab_size: int, rng: np.random.Generator) -> dict[str, Any]:
    def prompts(count: int, tokens: int) -> list[list[int]]:
        return rng.integers(0, vocab_size, (count, tokens)).tolist()

    rounds, quiet, disturbed = [], [], []
    for _ in range(1 + _ROUNDS.value):  # the first warms up
        (idle_prompt, loaded_prompt) = prompts(2, _PROMPT_TOKENS.value)
        await asyncio.sleep(1.0)  # until the steps of the round before are done: an aborted row's may go on
        idle = await first_token_s(engine, idle_prompt)
        load = Load(engine, prompts(_BATCH_SIZE.value - 1, 16))
        await asyncio.sleep(1.0)  # until all rows decode
        load.gaps.clear()
        await asyncio.sleep(_MOST_PAUSE_S * (1 + rng.random()))
        quiet.append(max(load.gaps, default=0.0))
        load.gaps.clear()
        loaded = await first_token_s(engine, loaded_prompt)
        await asyncio.sleep(_MOST_PAUSE_S)
        disturbed.append(max(load.gaps, default=0.0))
        await load.stop()
        rounds.append((idle, loaded))
    idle, loaded = (statistics.median(of) for of in zip(*rounds[1:], strict=True))
    ratio = statistics.median(loaded / idle for idle, loaded in rounds[1:])
    gaps = {"quiet_gap_s": statistics.median(quiet[1:]), "gap_s": statistics.median(disturbed[1:])}
    return {"idle_s": idle, "loaded_s": loaded, "ratio": ratio, **gaps}


async def run(model_dir: pathlib.Path, chunk_tokens: int, vocab_size: int) -> dict[str, Any]:
    async with AsyncEngine(
        str(model_dir),
        dtype=_DTYPE.value,
        max_model_len=max(_PROMPT_TOKENS.value, 16) + _GENERATED,
        max_num_seqs=_BATCH_SIZE.value,
        max_num_batched_tokens=chunk_tokens,
        enable_prefix_caching=False,
    ) as engine:
        found = await measure(engine, vocab_size, np.random.default_rng(0))
    print(
        f"chunks of {chunk_tokens}: first token after {found['idle_s']:.3f} s idle and {found['loaded_s']:.3f} s "
        f"beside {_BATCH_SIZE.value - 1} rows, {found['ratio']:.2f} times as long; longest gap of a row "
        f"{found['gap_s']:.3f} s, {found['quiet_gap_s']:.3f} s with no prompt beside it",
        flush=True,
    )
    return {"chunk_tokens": chunk_tokens, **found}


def main(argv: list[str]) -> None:
    del argv
    config = bench_models.hf_config(_SHAPE.value, _LAYERS.value)
    with tempfile.TemporaryDirectory() as directory:
        model_dir = pathlib.Path(directory) / "model"
        bench_models.write_random(model_dir, config, _DTYPE.value)
        results = [asyncio.run(run(model_dir, int(n), config["vocab_size"])) for n in _CHUNK_TOKENS.value]
    workload = {flag.name: flag.value for flag in (_SHAPE, _DTYPE, _PROMPT_TOKENS, _BATCH_SIZE)}
    bench_record.print_record(bench_record.describe_run("bench_load") | workload | {"results": results})


if __name__ == "__main__":
    app.run(main)
