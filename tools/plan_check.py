"""Holds the step times that plan_mesh computes against those of the engine's own compiled steps, on one device.

    python tools/plan_check.py                                               # five random Llamas, float32, CPU
    python tools/plan_check.py --output=docs/benchmarks/plan_cpu.json
    python tools/plan_check.py --device=h100 --models=8b --rounds=20         # on that GPU, bfloat16

Steps decode 1 and 8 rows behind a short and a long context, or prefill a chunk of a prompt. Those of a model are timed
by turns, and the figure is the median of the rounds. A CPU is calibrated in the same rounds, for on a machine that is
shared nothing is as fast as an hour ago; a GPU's rates are computed from its data sheet. Nothing that a prediction is
made of was measured of the model that it is for.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from jaxinfer import models
from jaxinfer.config import ModelConfig
from jaxinfer.engine_config import EngineConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition, model_weights
from jaxinfer.partitioning import Partitioner
from jaxinfer.planning import plan
from jaxinfer.planning.calibration import Calibration, Sizes, cpu_cluster
from jaxinfer.planning.candidates import Planner, Rejection
from jaxinfer.planning.clusters import CPU, Cluster, parse_devices
from jaxinfer.planning.loads import Load
from jaxinfer.planning.roofline import StepTime
from jaxinfer.planning.step_timer import StepTimer
from jaxinfer.planning.workload import Workload
from jaxinfer.tools import bench_models, bench_record

_DEVICE = flags.DEFINE_string("device", "cpu", "What the steps run on, as plan_mesh spells it.")
_MODELS = flags.DEFINE_list("models", ["12m", "46m", "125m", "254m", "476m"], "Shapes of random Llamas.")
_LAYERS = flags.DEFINE_integer("layers", None, "Layers, instead of the shapes'.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.", lower_bound=1)
_ROWS = flags.DEFINE_list("rows", ["1", "8"], "Sequences that decode together.")
_CONTEXTS = flags.DEFINE_list("contexts", ["128", "900"], "Tokens that each of them has cached.")
_CHUNK = flags.DEFINE_integer("chunk", 512, "Tokens of the chunk.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "Calibrates with small sizes: for the logic, not for the figures.")
_OUTPUT = flags.DEFINE_string("output", None, "File for the record.")

QUICK = Sizes(
    matrix=(64, 32),
    num_pairs=1,
    num_tokens=(1, 8),
    depths=(1, 2),
    rows=2,
    contexts=(16, 48),
    chunk=32,
    vocab_size=64,
    embed_dim=32,
)
_NUM_STEPS = EngineConfig().decode_steps
_DTYPES = {"cpu": "float32", "gpu": "bfloat16"}


class Step(NamedTuple):
    """A kind of step of a model, predicted and measured.

    Attributes:
      seconds: of each round.
    """

    load: Load
    predicted: StepTime
    seconds: list[float]

    @property
    def measured_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """Above 1: it was faster than predicted."""
        return self.predicted.total_s / self.measured_s

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else 3 * self.seconds
        parts = {name: 1e3 * value for name, value in vars(self.predicted).items() if value}
        return {
            **self.load._asdict(),
            "predicted_ms": 1e3 * self.predicted.total_s,
            "measured_ms": 1e3 * self.measured_s,
            "measured_iqr_ms": [1e3 * low, 1e3 * high],
            "ratio": self.ratio,
            "predicted_of": {name.removesuffix("_s"): value for name, value in parts.items()},
        }

    def __str__(self) -> str:
        load = self.load
        what = f"chunk of {load.chunk_tokens}" if load.chunk_tokens else f"{load.rows} x {load.context:g}"
        predicted, measured = (f"{1e3 * s:9.2f} ms" for s in (self.predicted.total_s, self.measured_s))
        return f"  {what:14} {predicted} {measured} {self.ratio:7.2f}   {self.predicted.bound}"


def loads(rows: Sequence[int], contexts: Sequence[int], chunk: int) -> list[Load]:
    """Steps that decode, and the first of a prompt."""
    return [*(Load(n, context) for context in contexts for n in rows), Load(0, 0, chunk, chunk / 2)]


def check(
    config: ModelConfig,
    cluster: Cluster,
    of_steps: Sequence[Load],
    rounds: int,
    calibration: Calibration | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Step]:
    """Each of `of_steps` of a model with random weights, on the first device, beside `calibration`.

    Without that the rates are those of `cluster`. Raises ValueError if the model does not fit.
    """
    dtype = jnp.dtype(_DTYPES[cluster.platform])
    planned = Planner(
        config=EngineConfig(max_model_len=config.max_position),
        model=config,
        weights=model_weights(config, dtype),
        dtype=dtype,
        cluster=cluster,
        free_bytes=cluster.memory_bytes,
        workload=Workload(),
        num_seqs=1,
    ).candidate("data:1")
    if isinstance(planned, Rejection):
        raise ValueError(planned.reason)
    definition = ModelDefinition.create(config, Partitioner.create(devices=jax.devices()[:1]), dtype)
    plan = planned.plan
    sizes = {"page_size": plan.page_size, "backend": plan.attention.name, "num_steps": _NUM_STEPS}
    timer = StepTimer(definition, definition.init(), of_steps, **sizes, clock=clock)
    for load in of_steps:
        timer.seconds(load)  # what happens the first time only
    seconds, calibrated = [], []
    for _ in range(rounds):
        calibrated += [calibration.run()] if calibration else []
        seconds.append([timer.seconds(load) for load in of_steps])
    timer.close()
    model = planned.model
    if calibration:
        cluster = dataclasses.replace(cluster, rates=calibration.rates(calibrated))
        model = dataclasses.replace(model, cluster=cluster)
    predicted = (model.step_time(load, 1 if load.chunk_tokens else _NUM_STEPS) for load in of_steps)
    return [Step(*of_step) for of_step in zip(of_steps, predicted, map(list, zip(*seconds, strict=True)), strict=True)]


def main(argv: list[str]) -> None:
    del argv
    of_steps = loads([*map(int, _ROWS.value)], [*map(int, _CONTEXTS.value)], _CHUNK.value)
    if parse_devices(_DEVICE.value)[0] == CPU:
        calibration = Calibration(QUICK) if _QUICK.value else Calibration()
        cluster = cpu_cluster(1, calibration.rates([calibration.run()]))
    else:
        calibration, cluster = None, plan.cluster(_DEVICE.value)
    if cluster.platform != jax.default_backend():
        raise app.UsageError(f"--device={_DEVICE.value} is a {cluster.platform}; JAX runs on {jax.devices()[0]}")
    results = []
    for name in _MODELS.value:
        hf = HFConfig(bench_models.hf_config(name, _LAYERS.value))
        config = models.for_architecture(hf.architecture).parse_config(hf)
        steps = check(config, cluster, of_steps, _ROUNDS.value, calibration)
        num_params = model_weights(config, jnp.dtype("float32")).num_params
        print(f"{name}: {num_params / 1e6:.0f} M parameters     predicted     measured   ratio   bound by")
        print(*steps, sep="\n", flush=True)
        results.append({"model": name, "num_params": num_params, "steps": [s.record() for s in steps]})
    ratios = [step["ratio"] for result in results for step in result["steps"]]
    print(f"predicted over measured: {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")
    record = bench_record.describe_run("plan_check") | {"rounds": _ROUNDS.value, "results": results}
    if _OUTPUT.value:
        pathlib.Path(_OUTPUT.value).write_text(json.dumps(record, indent=4) + "\n", encoding="utf-8")
    bench_record.print_record(record)


if __name__ == "__main__":
    app.run(main)
