"""Measures offline throughput: many requests of ragged lengths, all there at once, against peers in the same run.

    python tools/bench_offline.py                                   # 61 M parameters, float32, CPU; takes a while

The workload is nano-vLLM's: 256 requests whose prompts and outputs are uniformly 100 to 1,024 tokens long, here times
--scale. Peers:

    transformers         its generate() on static batches in the order of arrival, padded on the left; a batch is done
                         when its longest output is
    transformers_sorted  the same, sorted by length of output: what somebody who knew the lengths would do

All generate greedily the number of tokens that is asked for, and only those count. Rounds alternate between them, each
with new prompts; the figure is the median of the rounds' ratios.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from jaxinfer import Engine, SamplingParams
from jaxinfer.tools import bench_models, bench_peer, bench_record

_PEERS = ("transformers", "transformers_sorted")
_PEERS_FLAG = flags.DEFINE_list("peers", ["transformers", "transformers_sorted"], f"Any of {', '.join(_PEERS)}.")
_SHAPE = flags.DEFINE_enum("shape", "61m", list(bench_models.SHAPES), "Which random Llama.")
_LAYERS = flags.DEFINE_integer("layers", None, "Layers, instead of the shape's.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of weights and cache.")
_REQUESTS = flags.DEFINE_integer("requests", 256, "Requests of a round.", lower_bound=1)
_PROMPT_TOKENS = flags.DEFINE_list(
    "prompt_tokens", ["100", "1024"], "Least and most tokens of a prompt, times --scale."
)
_OUTPUT_TOKENS = flags.DEFINE_list("output_tokens", ["100", "1024"], "Least and most tokens generated, times --scale.")
_SCALE = flags.DEFINE_float("scale", 0.125, "Of the lengths.", lower_bound=0.01)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Slots of the engine, and sequences of a static batch.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed rounds of each.", lower_bound=1)


class Workload(NamedTuple):
    prompts: list[list[int]]
    lengths: list[int]  # tokens to generate for each


Generate = Callable[[Workload], list[list[int]]]


def make_workload(rng: np.random.Generator, vocab_size: int, num_requests: int) -> Workload:
    def lengths(bounds: list[str]) -> np.ndarray:
        low, high = (max(1, round(int(bound) * _SCALE.value)) for bound in bounds)
        return rng.integers(low, high + 1, num_requests)

    prompts = [rng.integers(0, vocab_size, size).tolist() for size in lengths(_PROMPT_TOKENS.value)]
    return Workload(prompts, lengths(_OUTPUT_TOKENS.value).tolist())


def make_ours(model_dir: pathlib.Path) -> Generate:
    longest = sum(round(int(bounds[1]) * _SCALE.value) for bounds in (_PROMPT_TOKENS.value, _OUTPUT_TOKENS.value))
    engine = Engine(
        str(model_dir),
        dtype=_DTYPE.value,
        max_model_len=longest + 1,
        max_num_seqs=_BATCH_SIZE.value,
    )

    def generate(workload: Workload) -> list[list[int]]:
        params = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=n) for n in workload.lengths]
        return [output.outputs[0].token_ids for output in engine.generate(workload.prompts, params)]

    return generate


def make_transformers(model: Any, is_sorted: bool) -> Generate:
    """Static batches, by torch's own choice of threads or by one: on a busy machine one can be many times as fast."""
    import torch

    own_choice, trial_s = torch.get_num_threads(), dict[int, float]()

    def generate(workload: Workload) -> list[list[int]]:
        if not trial_s:
            for num_threads in (own_choice, 1):
                torch.set_num_threads(num_threads)
                start = time.perf_counter()
                run(workload)
                trial_s[num_threads] = time.perf_counter() - start
        torch.set_num_threads(min(trial_s, key=lambda n: trial_s[n]))
        return run(workload)

    @torch.inference_mode()
    def run(workload: Workload) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in workload.prompts]
        order = list(range(len(outputs)))
        if is_sorted:
            order.sort(key=lambda i: workload.lengths[i])
        for start in range(0, len(order), _BATCH_SIZE.value):
            batch = order[start : start + _BATCH_SIZE.value]
            width = max(len(workload.prompts[i]) for i in batch)
            prompts = torch.tensor([[0] * (width - len(workload.prompts[i])) + workload.prompts[i] for i in batch])
            mask = torch.tensor([[j >= width - len(workload.prompts[i]) for j in range(width)] for i in batch])
            longest = max(workload.lengths[i] for i in batch)
            tokens = model.generate(
                input_ids=prompts.to(model.device),
                attention_mask=mask.long().to(model.device),
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                pad_token_id=0,
            )
            for i, row in zip(batch, tokens[:, width:].tolist(), strict=True):
                outputs[i] = row[: workload.lengths[i]]
        return outputs

    return generate


def make_peers(model_dir: pathlib.Path) -> dict[str, Generate]:
    if not _PEERS_FLAG.value:
        return {}
    from jaxinfer.tools import bench_peer_torch

    model = bench_peer_torch.load(model_dir, _DTYPE.value)
    return {name: make_transformers(model, name == "transformers_sorted") for name in _PEERS_FLAG.value}


def compare(ours: Generate, peers: dict[str, Generate], vocab_size: int) -> dict[str, Any]:
    """Alternating rounds; prints and returns the figures."""
    rng = np.random.default_rng(0)
    programs = {"ours": ours, **peers}
    warm_up = make_workload(rng, vocab_size, _BATCH_SIZE.value // 4 + 1)
    for generate in programs.values():
        generate(warm_up)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    num_tokens, num_equal = [], 0
    for _ in range(_ROUNDS.value):
        workload = make_workload(rng, vocab_size, _REQUESTS.value)
        num_tokens.append(sum(workload.lengths))
        outputs = {}
        for name, generate in programs.items():
            start = time.perf_counter()
            outputs[name] = generate(workload)
            seconds[name].append(time.perf_counter() - start)
            assert [*map(len, outputs[name])] == workload.lengths, f"{name} generated other lengths"
            print(f"  {name}: {num_tokens[-1]} tokens in {seconds[name][-1]:.1f} s", flush=True)
        num_equal += sum(all(rows[i] == row for rows in outputs.values()) for i, row in enumerate(outputs["ours"]))
    result: dict[str, Any] = {"output_tokens": sum(num_tokens), "requests_all_equal": num_equal}
    for name, times in seconds.items():
        rates, ratios = np.array(num_tokens) / times, np.array(times) / seconds["ours"]
        result[name] = {"tokens_per_s": np.median(rates)}
        line = f"{name}: {np.median(rates):.1f} output tokens/s"
        if name != "ours":
            result[name] |= {"ratio": np.median(ratios), "ratios": ratios.tolist()}
            line += f"; ours is {np.median(ratios):.2f} times as fast (rounds {min(ratios):.2f} to {max(ratios):.2f})"
        print(line)
    print(f"{num_equal} of {_REQUESTS.value * _ROUNDS.value} requests have the same tokens from all")
    return result


def main(argv: list[str]) -> None:
    del argv
    if unknown := set(_PEERS_FLAG.value) - set(_PEERS):
        raise app.UsageError(f"--peers={','.join(sorted(unknown))}: unknown; known: {', '.join(_PEERS)}")
    config = bench_models.hf_config(_SHAPE.value, _LAYERS.value)
    with tempfile.TemporaryDirectory() as directory:
        model_dir = pathlib.Path(directory) / "model"
        bench_models.write_random(model_dir, config, _DTYPE.value)
        peers = make_peers(model_dir)
        result = compare(make_ours(model_dir), peers, config["vocab_size"])
    run = bench_record.describe_run("bench_offline", bench_peer.packages(["hf"] if _PEERS_FLAG.value else []))
    workload = {flag.name: flag.value for flag in (_SHAPE, _DTYPE, _REQUESTS, _SCALE, _BATCH_SIZE)}
    bench_record.print_record(run | workload | {"results": result})


if __name__ == "__main__":
    app.run(main)
