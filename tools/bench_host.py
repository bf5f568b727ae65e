"""Measures what the host does per step: plan, pages, prefix digests, arrays, and taking the tokens in. No model.

    python tools/bench_host.py
    python tools/bench_host.py --running=256 --page_sizes=16 --loads=mix

The step under way hides it as long as it is the shorter of the two; on a fast device a step takes a few milliseconds.
Loads, each with about 1,000 tokens in the cache per sequence:

    decode1, decode8    nobody comes or goes; 1 or 8 tokens per sequence and step
    mix                 decode1 with a new request for each that ends, after 1,024 tokens; half of its prompt of 500
                        is one that all share

Time is this thread's on a CPU, so other programs count only by the caches that they spoil. `to linear` is the growth
of the time over the growth of the number of sequences, from the row above: at most 1 where the host scales.
"""

import random
import time

import numpy as np
from absl import app, flags

from jaxinfer.batch import Buckets, StepBatch, StepShape
from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.engine_core import EngineCore
from jaxinfer.extras import Extras, ExtrasSpec
from jaxinfer.integers import cdiv
from jaxinfer.output_text import OutputText
from jaxinfer.request import Request
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduler import Scheduler
from jaxinfer.shard import ShardSizes
from jaxinfer.stats import EngineStats
from jaxinfer.steps import StepOutput
from jaxinfer.tools.bench_record import describe_run, print_record

_RUNNING = flags.DEFINE_list("running", ["64", "128", "256", "512", "1024"], "Sequences that run, ascending.")
_PAGE_SIZES = flags.DEFINE_list("page_sizes", ["16", "64"], "Tokens per page.")
_LOADS = flags.DEFINE_list("loads", ["decode1", "decode8", "mix"], "Which of the loads above.")
_STEPS = flags.DEFINE_integer("steps", 200, "Timed steps.", lower_bound=1)

_MAX_MODEL_LEN = 4096
_PROMPT, _STEM, _OUTPUT = 500, 250, 1024


class NoModel:
    """A runner whose every row generates token 1 as often as it may."""

    def __init__(self, buckets: Buckets):
        self.buckets = buckets
        self.extras_spec = ExtrasSpec.create(buckets, vocab_size=100_000)
        self._outputs: dict[StepShape, StepOutput] = {}

    def is_compiled(self, shape: StepShape, extras: Extras | None) -> bool:
        return True

    def check_compiled(self, shape: StepShape, extras: Extras | None) -> None:
        """All are."""

    def dispatch(self, shape: StepShape, batch: StepBatch, extras: Extras | None) -> StepOutput:
        assert extras is None
        if shape not in self._outputs:
            rows = batch.slots.shape
            tokens = np.ones((*rows, shape.num_steps), np.int32)
            self._outputs[shape] = StepOutput(tokens, np.full(rows, shape.num_steps, np.int32), np.ones(rows, bool))
        return self._outputs[shape]


def make_core(num_running: int, page_size: int, decode_steps: int) -> EngineCore:
    """With a page for everything, so that nothing is evicted or preempted."""
    budget = num_running + 512
    buckets = Buckets.create(
        max_rows=num_running,
        max_model_len=_MAX_MODEL_LEN,
        max_chunk=budget,
        page_size=page_size,
        decode_steps=decode_steps,
        num_shards=1,
    )
    sizes = ShardSizes(
        num_shards=1,
        slots_per_shard=num_running,
        pages_per_shard=1 + num_running * cdiv(_MAX_MODEL_LEN, page_size),
        page_size=page_size,
        max_model_len=_MAX_MODEL_LEN,
    )
    scheduler = Scheduler(sizes, ChunkPolicy(budget, buckets.chunk_tokens), decode_steps=decode_steps)
    return EngineCore(scheduler, NoModel(buckets), EngineStats())  # pyright: ignore[reportArgumentType]


class Load:
    """Adds requests to a core; under way from the start, as if it had been running for long."""

    def __init__(self, core: EngineCore, seed: int):
        self._core = core
        self._rng = random.Random(seed)
        self._stem = self._random_tokens(_STEM)
        self._number = 0

    def add(self, num_done: int, max_tokens: int) -> None:
        """A request that has generated `num_done` tokens already."""
        prompt = self._stem + self._random_tokens(_PROMPT - _STEM + num_done)
        params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=max_tokens)
        request = Request(
            number=self._number,
            prompt=None,
            token_ids=prompt,
            params=params,
            stop_token_ids=(2, 3),
            max_tokens=max_tokens,
            seed=self._number,
            text=OutputText(None, ()),
        )
        self._number += 1
        self._core.scheduler.add(request)

    def start(self, num_running: int, is_mix: bool) -> None:
        """Until all are decoding, at all stages of their output."""
        for i in range(num_running):
            num_done = _OUTPUT * i // num_running
            self.add(num_done, _OUTPUT - num_done if is_mix else _MAX_MODEL_LEN - _PROMPT - num_done)
        while self._core.scheduler.shards[0].prefilling or self._core.scheduler.waiting:
            self._step_and_replace()

    def timed_steps(self, num_steps: int) -> list[float]:
        """Seconds of each; a new request for each that ended comes in between."""
        return [self._step_and_replace() for _ in range(num_steps)]

    def _step_and_replace(self) -> float:
        start = time.thread_time()
        touched = self._core.step()
        seconds = time.thread_time() - start
        for _ in filter(lambda request: request.finish_reason is not None, touched):
            self.add(0, _OUTPUT)
        return seconds

    def _random_tokens(self, count: int) -> list[int]:
        return self._rng.choices(range(4, 100_000), k=count)


def measure(load_name: str, page_size: int, num_running: int) -> dict[str, float]:
    """Microseconds per step at one load."""
    core = make_core(num_running, page_size, decode_steps=8 if load_name == "decode8" else 1)
    load = Load(core, seed=0)
    load.start(num_running, is_mix=load_name == "mix")
    microseconds = 1e6 * np.array(load.timed_steps(_STEPS.value))
    core.scheduler.check()
    median, p90 = np.percentile(microseconds, (50, 90))
    return {"running": num_running, "median_us": round(float(median), 1), "p90_us": round(float(p90), 1)}


def main(argv: list[str]) -> None:
    del argv
    results = []
    for name in _LOADS.value:
        for page_size in map(int, _PAGE_SIZES.value):
            print(f"{name}, page size {page_size}\n  running   median us   p90 us   to linear")
            before = None
            for num_running in map(int, _RUNNING.value):
                row = measure(name, page_size, num_running)
                growth = row["median_us"] / row["running"] / (before["median_us"] / before["running"]) if before else 1
                print(f"  {num_running:7}   {row['median_us']:9.0f}   {row['p90_us']:6.0f}   {growth:9.2f}", flush=True)
                results.append({"load": name, "page_size": page_size, "to_linear": round(growth, 3), **row})
                before = row
    print_record(describe_run("bench_host") | {"steps": _STEPS.value, "results": results})


if __name__ == "__main__":
    app.run(main)
