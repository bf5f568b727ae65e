"""Measures what this machine's CPU does per second: matrix products of some sizes, and the steps of a small model.

Everything beside large products comes from the engine's own compiled steps, as a difference of two of them: in the
context attention's rates, in greedy or not sampling's, in layers what a layer takes. All are timed by turns, for other
programs may take a part of the machine, and the medians count. In float32.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import devices
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.engine_config import EngineConfig
from jaxinfer.parameters import ModelDefinition, model_weights
from jaxinfer.partitioning import Partitioner
from jaxinfer.planning.candidates import Candidate, Planner
from jaxinfer.planning.clusters import CPU, Cluster, Rates
from jaxinfer.planning.hardware import Link
from jaxinfer.planning.loads import Load
from jaxinfer.planning.roofline import MeshModel
from jaxinfer.planning.step_timer import StepTimer
from jaxinfer.planning.workload import Workload
from pallas_kernels.matmul import contract

_ROUNDS = 5
_FEW_TOKENS = 64  # up to which all matrices are timed, for they are waited for
_RENDEZVOUS_S = 25e-6  # of a collective, for each of the threads that stand for devices
_SUM_PASSES = 8  # over an array, at the rate at which it would be read, in a collective
_NUM_STEPS = EngineConfig().decode_steps
_LEAST_SHARE = 0.1  # of a rate, which a noisy difference of times may make negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is timed.

    Attributes:
      matrix: out and in of the weights, a pair of which leads from tokens to tokens.
      num_pairs: of these; together more than a cache holds.
      num_tokens: that are multiplied at once; of many, one pair is enough.
      depths: layers of the small models.
      rows, contexts, chunk: of their steps.
    """

    matrix: tuple[int, int] = (8192, 2048)
    num_pairs: int = 2
    num_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 65, 128, 256, 512)
    depths: tuple[int, int] = (2, 4)
    rows: int = 8
    contexts: tuple[int, int] = (64, 960)
    chunk: int = 256
    vocab_size: int = 8192
    embed_dim: int = 256


class TimedStep(NamedTuple):
    """Of a model of `depth` layers."""

    depth: int
    load: Load
    draws: bool = True


class Steps(NamedTuple):
    """Those that `rates_of` compares."""

    shallow: TimedStep
    one: TimedStep
    rows: TimedStep
    greedy_rows: TimedStep
    long_rows: TimedStep
    chunk: TimedStep
    later_chunk: TimedStep


def steps_of(sizes: Sizes) -> Steps:
    """For a calibration of these sizes."""
    (few, many), (short, long), chunk = sizes.depths, sizes.contexts, sizes.chunk
    rows = Load(sizes.rows, short)
    return Steps(
        shallow=TimedStep(few, Load(1, short)),
        one=TimedStep(many, Load(1, short)),
        rows=TimedStep(many, rows),
        greedy_rows=TimedStep(many, rows, draws=False),
        long_rows=TimedStep(many, Load(sizes.rows, long)),
        chunk=TimedStep(many, Load(0, 0, chunk, chunk / 2)),
        later_chunk=TimedStep(many, Load(0, 0, chunk, chunk + chunk / 2)),
    )


def cpu_cluster(num_devices: int, rates: Rates | None = None) -> Cluster:
    """This machine's CPU as so many virtual devices of JAX; without `rates` these are measured, in half a minute.

    The devices have the same cores and memory, so each has its share of the rates, and more of them are never faster
    than one: such a plan is to try a mesh, not to gain by it. Raises RuntimeError where the system does not say how
    much memory is free.
    """
    available = devices.free_bytes(jax.devices(CPU)[0])
    if available is None:
        raise RuntimeError("this system does not say how much memory is free, so nothing can be planned for its CPU")
    of_all = available * len(jax.devices(CPU))
    rates = (rates or measure_rates()).shared(num_devices)
    link = Link(name="memory", bytes_per_s=rates.bytes_per_s / _SUM_PASSES, latency_s=_RENDEZVOUS_S * num_devices)
    return Cluster(
        name=CPU,
        device_kind=CPU,
        platform=CPU,
        memory_bytes=of_all // num_devices,
        rates=rates,
        num_nodes=1,
        devices_per_node=num_devices,
        link=link,
        network=link,
    )


def measure_rates() -> Rates:
    """Of the CPU as one device. Takes half a minute, most of it to compile, and 300 MB."""
    calibration = Calibration()
    return calibration.rates([calibration.run() for _ in range(_ROUNDS)])


Round = dict[int | TimedStep, float]  # seconds of each product, by its number of tokens, and of each step


class Calibration:
    """Timers, compiled and warm."""

    def __init__(self, sizes: Sizes = Sizes(), clock: Callable[[], float] = time.perf_counter):
        self._sizes, self._steps = sizes, steps_of(sizes)
        self._models = {depth: small_model(sizes, depth) for depth in sizes.depths}
        partitioner = Partitioner.create(devices=jax.devices(CPU)[:1])
        timers = {}
        for depth, model in self._models.items():
            definition = ModelDefinition.create(_config(sizes, depth), partitioner, jnp.dtype("float32"))
            loads = dict.fromkeys(step.load for step in self._steps if step.depth == depth)
            sizes_of_cache = {"page_size": model.plan.page_size, "backend": model.plan.attention.name}
            timers[depth] = StepTimer(definition, _weights(definition), [*loads], **sizes_of_cache, clock=clock)
        self._timers: dict[int | TimedStep, Callable[[], float]] = {**_product_timers(sizes, clock)}
        for step in self._steps:
            self._timers[step] = functools.partial(timers[step.depth].seconds, step.load, draws=step.draws)
        self.run()  # what happens the first time only

    def run(self) -> Round:
        """Times each of them once."""
        return {name: timer() for name, timer in self._timers.items()}

    def rates(self, rounds: Sequence[Round]) -> Rates:
        """From the medians of some rounds."""
        medians = {name: statistics.median(of[name] for of in rounds) for name in self._timers}
        return rates_of(self._sizes, {depth: found.model for depth, found in self._models.items()}, medians)


def rates_of(sizes: Sizes, models: Mapping[int, MeshModel], seconds: Round) -> Rates:
    """`models` are those of each depth."""
    steps, numbers = steps_of(sizes), sizes.matrix[0] * sizes.matrix[1]
    flops = tuple((n, 2 * numbers * n / seconds[n]) for n in sizes.num_tokens)
    deep = models[sizes.depths[1]]

    def more(a: TimedStep, b: TimedStep) -> tuple[float, float, float]:
        """FLOPs, bytes and seconds that a has more of than b."""
        more_flops, more_bytes = (x - y for x, y in zip(deep.work(a.load), deep.work(b.load), strict=True))
        return more_flops, more_bytes, max(seconds[a] - seconds[b], 1e-9)

    by_row, by_chunk = more(steps.long_rows, steps.rows), more(steps.later_chunk, steps.chunk)
    rates = Rates(
        bytes_per_s=flops[0][1] * 4 / 2,  # a product with one vector takes each float32 once, for two operations
        flops=flops,
        **_attention_rates(by_row, by_chunk),
        logits_per_s=sizes.rows * sizes.vocab_size / max(seconds[steps.rows] - seconds[steps.greedy_rows], 1e-9),
        layer_s=0.0,
        token_s=0.0,
        step_s=0.0,
    )

    def left(step: TimedStep) -> float:
        """Seconds that the rates do not explain."""
        model = models[step.depth]
        cluster = dataclasses.replace(model.cluster, rates=rates)
        num_steps = 1 if step.load.chunk_tokens else _NUM_STEPS
        return seconds[step] - dataclasses.replace(model, cluster=cluster).step_time(step.load, num_steps).total_s

    few, many = sizes.depths
    of_layer = (left(steps.one) - left(steps.shallow)) / (many - few)
    of_step = _NUM_STEPS * (left(steps.shallow) - few * of_layer)
    of_chunk = (left(steps.chunk) - of_step) / many
    token_s = max(0.0, of_chunk - of_layer) / (sizes.chunk - 1)
    return dataclasses.replace(rates, layer_s=max(0.0, of_layer - token_s), token_s=token_s, step_s=max(0.0, of_step))


def _attention_rates(by_row: tuple[float, float, float], by_chunk: tuple[float, float, float]) -> dict[str, float]:
    """From FLOPs, bytes and seconds of two kinds of work: each takes both."""
    work = np.array([by_row[:2], by_chunk[:2]])
    times = np.array([by_row[2], by_chunk[2]])
    alone = np.array([by_chunk[2] / by_chunk[0], by_row[2] / by_row[1]])  # if the other took no time
    flop_s, byte_s = np.clip(np.linalg.solve(work, times), _LEAST_SHARE * alone, alone)
    return {"attention_flops": float(1 / flop_s), "attention_bytes_per_s": float(1 / byte_s)}


def _config(sizes: Sizes, depth: int) -> ModelConfig:
    """As narrow as small models are, so that what a layer takes beside its products shows."""
    return ModelConfig(
        family="llama",
        vocab_size=sizes.vocab_size,
        embed_dim=sizes.embed_dim,
        num_layers=depth,
        num_q_heads=16,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=11 * sizes.embed_dim // 4,
        max_position=2048,
        norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
    )


def _weights(definition: ModelDefinition) -> tuple[jax.Array, ...]:
    """Of no meaning, without a program to compile for each."""
    return tuple(jax.device_put(np.full(spec.shape, 0.01, spec.dtype), spec.sharding) for spec in definition.params)


def small_model(sizes: Sizes, depth: int) -> Candidate:
    """Whose times nobody asked for yet."""
    unknown = Rates(
        bytes_per_s=1.0,
        flops=((1, 1.0),),
        attention_bytes_per_s=1.0,
        attention_flops=1.0,
        logits_per_s=1.0,
        layer_s=0.0,
        token_s=0.0,
        step_s=0.0,
    )
    config, dtype = _config(sizes, depth), jnp.dtype("float32")
    found = Planner(
        config=EngineConfig(max_model_len=config.max_position, max_num_batched_tokens=sizes.chunk),
        model=config,
        weights=model_weights(config, dtype),
        dtype=dtype,
        cluster=cpu_cluster(1, unknown),
        free_bytes=2**40,
        workload=Workload(objective="latency", prompt_tokens=1, output_tokens=1),
    ).candidate("data:1")
    assert isinstance(found, Candidate), found
    return found


def _product_timers(sizes: Sizes, clock: Callable[[], float]) -> dict[int, Callable[[], float]]:
    """By number of tokens; seconds of one product."""
    (n_out, n_in), count = sizes.matrix, sizes.num_pairs
    make = jax.jit(lambda shape: jnp.full(shape, 1 / shape[1]), static_argnums=0)  # pages of zeros may be one page
    pairs = [(make((n_out, n_in)), make((n_in, n_out))) for _ in range(count)]

    @jax.jit
    def multiply(x: jax.Array, pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        for up, down in pairs:
            x = contract(contract(x, up), down)
        return x

    def seconds(x: jax.Array, pairs: list[tuple[jax.Array, jax.Array]]) -> float:
        start = clock()
        multiply(x, pairs).block_until_ready()
        return (clock() - start) / (2 * len(pairs))

    return {
        n: functools.partial(seconds, jnp.ones((n, n_in)), pairs if n <= _FEW_TOKENS else pairs[:1])
        for n in sizes.num_tokens
    }
