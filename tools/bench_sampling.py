"""Measures what choosing the next tokens takes, beside a full sort and beside the step that it ends.

    python tools/bench_sampling.py                                    # 64 rows of 128,256 logits, float32
    python tools/bench_sampling.py --batch_sizes=1,8,64 --shape=254m

Of each way to draw and each kind of logits (`peaked` as trained models have them, `flat` as random ones do):

    ours        `sampling.sample`, as it is compiled into a step: by a kernel, if there is one for the device
    xla         the same as XLA compiles it
    sort        the same draw from all logits sorted, their sum cut where it reaches top_p: the usual way
    torch       likewise with torch.sort and torch.multinomial, if torch is installed

Greedy rows are an argmax in all of them.

A row's logits are made once. Rounds alternate between all of them; figures are medians, and of ratios the median of
the rounds' ratios. With --shape the last lines are a decode step of that random Llama, its vocabulary replaced, and
what of it goes to drawing within top-p instead of taking the likeliest.
"""

import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxinfer.attention import attention_specs
from jaxinfer.hf_config import HFConfig
from jaxinfer.planning.loads import Load
from jaxinfer.planning.step_timer import StepTimer
from jaxinfer.sampling import SamplingArrays, sample
from jaxinfer.tools import bench_models, bench_record
from pallas_kernels import paged_attention
from pallas_kernels.draw import Kernel, kernel_for

_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["64"], "Rows.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 128256, "Logits of a row.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each.", lower_bound=1)
_PEERS = flags.DEFINE_list("peers", ["xla", "sort", "torch"], "Of those above; one that is not there is left out.")
_SHAPE = flags.DEFINE_enum("shape", None, list(bench_models.SHAPES), "Of the model whose step is timed, too.")
_LAYERS = flags.DEFINE_integer("layers", None, "Layers, instead of the shape's.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of that model.")

WAYS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "all": {},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 50},
    "both": {"top_k": 20, "top_p": 0.9},
}
_LOGITS = {"peaked": 6.0, "flat": 0.1}  # standard deviations

Draw = Callable[[int], Any]  # of a position; to wait for


def params(num_rows: int, *, temperature: float = 1.0, top_k: float = 0, top_p: float = 1.0) -> SamplingArrays:
    """The same for all rows."""
    number = functools.partial(np.full, num_rows)
    return SamplingArrays(
        temperature=number(temperature, np.float32),
        top_k=number(top_k, np.int32),
        top_p=number(top_p, np.float32),
        min_p=number(0, np.float32),
        seed=np.arange(num_rows, dtype=np.uint32),
        draws=np.array(temperature > 0),
        truncates=np.array(top_k > 0 or top_p < 1),
    )


def ours(logits: np.ndarray, *, kernel: Kernel | None, **way: float) -> Draw:
    on_device, sampling = jax.device_put((logits, params(len(logits), **way)))
    of = functools.partial(sample, kernel=kernel)
    program = jax.jit(of).lower(on_device, sampling, _positions(logits, 0)).compile()
    return lambda position: program(on_device, sampling, _positions(logits, position))


def sort(logits: np.ndarray, *, temperature: float = 1.0, top_k: float = 0, top_p: float = 1.0) -> Draw:
    @jax.jit
    def draw(logits: jax.Array, position: jax.Array) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        ids = jnp.argsort(logits / temperature, axis=-1, descending=True)
        ordered = jnp.take_along_axis(logits, ids, axis=-1)
        ordered = jnp.where(jnp.arange(logits.shape[-1]) < (top_k or logits.shape[-1]), ordered, -jnp.inf)
        probs = jax.nn.softmax(ordered, axis=-1)
        ordered = jnp.where(jnp.cumsum(probs, axis=-1) - probs < top_p, ordered, -jnp.inf)
        place = jax.random.categorical(jax.random.fold_in(jax.random.key(0), position), ordered)
        return jnp.take_along_axis(ids, place[:, None], axis=-1)

    on_device = jax.device_put(logits)
    return lambda position: draw(on_device, jnp.int32(position))


def torch_sort(logits: np.ndarray, *, temperature: float = 1.0, top_k: float = 0, top_p: float = 1.0) -> Draw:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_device = torch.tensor(logits, device=device)

    def draw(position: int) -> Any:
        del position
        if temperature == 0:
            return torch.argmax(on_device, dim=-1).cpu()
        ordered, ids = torch.sort(on_device / temperature, dim=-1, descending=True)
        if top_k:
            ordered[:, int(top_k) :] = -torch.inf
        probs = torch.softmax(ordered, dim=-1)
        probs = torch.where(torch.cumsum(probs, dim=-1) - probs < top_p, probs, 0.0)
        place = torch.multinomial(probs, 1)
        return torch.gather(ids, -1, place).cpu()

    return draw


def compare(logits: np.ndarray, way: dict[str, float], peers: dict[str, Callable[..., Draw]]) -> dict[str, float]:
    """Seconds of each, and how often ours goes into each of `peers`."""
    draws = {
        name: make(logits, **way)
        for name, make in {"ours": functools.partial(ours, kernel=kernel_for(jax.devices()[0])), **peers}.items()
    }
    for draw in draws.values():
        jax.block_until_ready(draw(0))
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for position in range(_ROUNDS.value):
        for name, draw in draws.items():
            start = time.perf_counter()
            jax.block_until_ready(draw(position))
            seconds[name].append(time.perf_counter() - start)
    found = {f"{name}_s": statistics.median(of) for name, of in seconds.items()}
    for name in peers:
        ratios = [peer / own for peer, own in zip(seconds[name], seconds["ours"], strict=True)]
        found[f"{name}_ratio"] = statistics.median(ratios)
    return found


def step_seconds(shape: str, num_rows: int) -> dict[str, float]:
    """Of a step of the model with so many rows, and of it what drawing within top-p takes: medians of the rounds."""
    config = bench_models.hf_config(shape, _LAYERS.value) | {"vocab_size": _VOCAB_SIZE.value}
    definition, load = bench_models.define(HFConfig(config), _DTYPE.value), Load(num_rows, 64)
    partitioner, page_size = definition.partitioner, 64 if jax.default_backend() == "gpu" else 16
    specs = itertools.chain.from_iterable(attention_specs(definition.decoder_config, partitioner, page_size))
    backend = paged_attention.resolve("auto", specs, partitioner.device).name
    timer = StepTimer(definition, definition.init(), [load], page_size=page_size, backend=backend, num_steps=1)
    pairs = [(timer.seconds(load), timer.seconds(load, draws=False)) for _ in range(1 + _ROUNDS.value)]
    timer.close()
    steps, shares = zip(*((drawn, 1 - greedy / drawn) for drawn, greedy in pairs[1:]), strict=True)
    return {"step_s": statistics.median(steps), "sampling_share": statistics.median(shares)}


def _positions(logits: np.ndarray, position: int) -> np.ndarray:
    return np.full(len(logits), position, np.int32)


def _installed(names: list[str]) -> dict[str, Callable[..., Draw]]:
    of_xla = functools.partial(ours, kernel=None)
    peers: dict[str, Callable[..., Draw]] = {"xla": of_xla, "sort": sort, "torch": torch_sort}
    if unknown := sorted({*names} - {*peers}):
        raise app.UsageError(f"--peers={','.join(names)}: unknown {unknown}; known: {', '.join(peers)}")
    absent = {"torch"} if importlib.util.find_spec("torch") is None else set()
    absent |= {"xla"} if kernel_for(jax.devices()[0]) is None else set()
    return {name: peers[name] for name in names if name not in absent}


def main(argv: list[str]) -> None:
    del argv
    peers, results = _installed(_PEERS.value), []
    rng = np.random.default_rng(0)
    for num_rows in map(int, _BATCH_SIZES.value):
        for kind, deviation in _LOGITS.items():
            logits = rng.normal(0, deviation, (num_rows, _VOCAB_SIZE.value)).astype(np.float32)
            for name, way in WAYS.items():
                found = compare(logits, way, peers)
                results.append({"batch_size": num_rows, "logits": kind, "way": name, **found})
                told = "".join(f", {peer} {found[f'{peer}_ratio']:.1f} times as long" for peer in peers)
                print(f"{num_rows} rows, {kind}, {name}: {1e3 * found['ours_s']:.2f} ms{told}", flush=True)
        if _SHAPE.value:
            found = step_seconds(_SHAPE.value, num_rows)
            results.append({"batch_size": num_rows, **found})
            share, milliseconds = found["sampling_share"], 1e3 * found["step_s"]
            print(f"{num_rows} rows, a step of {_SHAPE.value}: {milliseconds:.1f} ms, drawing within top-p {share:.1%}")
    run = bench_record.describe_run("bench_sampling", ["torch"] if "torch" in peers else ())
    bench_record.print_record(run | {"vocab_size": _VOCAB_SIZE.value, "results": results})


if __name__ == "__main__":
    app.run(main)
