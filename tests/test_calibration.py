"""What is measured of a CPU for plans, by clocks that tick as the test says."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.planning.calibration import Calibration, Sizes, cpu_cluster, rates_of, small_model, steps_of
from jaxinfer.planning.clusters import Rates
from jaxinfer.planning.loads import Load
from jaxinfer.planning.roofline import MeshModel
from jaxinfer.planning.step_timer import StepTimer
from jaxinfer.tools import plan_check
from tests.plans import CPU_RATES

ROOT = pathlib.Path(__file__).parents[1]
TINY = ModelConfig(
    family="llama",
    vocab_size=64,
    embed_dim=32,
    num_layers=1,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=48,
    max_position=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
)


def models_of(sizes: Sizes) -> dict[int, MeshModel]:
    return {depth: small_model(sizes, depth).model for depth in sizes.depths}


def seconds_of(sizes: Sizes, models: dict[int, MeshModel], rates: Rates) -> dict:
    """Of everything that is timed, on a machine that is exactly as fast as that."""
    numbers = sizes.matrix[0] * sizes.matrix[1]
    seconds: dict = {n: 2 * numbers * n / rates.flops_at(n) for n in sizes.num_tokens}
    for step in steps_of(sizes):
        model = models[step.depth]
        on = dataclasses.replace(model, cluster=dataclasses.replace(model.cluster, rates=rates))
        time = on.step_time(step.load, 1 if step.load.chunk_tokens else 8)
        seconds[step] = time.total_s - (0 if step.draws else time.sampling_s)
    return seconds


def numbers_of(rates: Rates) -> dict[str, float]:
    """But those that depend on the number of tokens."""
    return {name: value for name, value in vars(rates).items() if name != "flops"}


def test_the_rates_of_a_machine_are_found_from_what_it_takes():
    sizes = Sizes(num_tokens=(1, 8, 32), rows=8, chunk=32)
    models = models_of(sizes)
    found = rates_of(sizes, models, seconds_of(sizes, models, CPU_RATES))
    assert dict(found.flops) == pytest.approx(dict(CPU_RATES.flops))
    assert numbers_of(found) == pytest.approx(numbers_of(CPU_RATES))


def test_noise_makes_no_rate_negative():
    """Steps with more to do that took no longer."""
    sizes = Sizes(num_tokens=(1, 8, 32), rows=8, chunk=32)
    models = models_of(sizes)
    seconds = seconds_of(sizes, models, CPU_RATES)
    steps = steps_of(sizes)
    seconds |= {steps.long_rows: seconds[steps.rows] / 2, steps.greedy_rows: 2 * seconds[steps.rows]}
    seconds |= {steps.shallow: 2 * seconds[steps.one]}
    found = numbers_of(rates_of(sizes, models, seconds))
    assert all(0 <= rate < float("inf") for rate in found.values()), found


def test_a_calibration_times_products_and_steps():
    """With a clock that ticks once for each look at it, whatever is timed takes a second."""
    sizes = plan_check.QUICK
    calibration = Calibration(sizes, clock=itertools.count().__next__)
    of_round = calibration.run()
    assert set(of_round) == {*sizes.num_tokens, *steps_of(sizes)}
    assert of_round[1] == 1 / 2  # one of the two products of a pair
    assert of_round[steps_of(sizes).rows] == 1 / 8  # a token of each row
    assert of_round[steps_of(sizes).chunk] == 1
    rates = calibration.rates([of_round, of_round, dict.fromkeys(of_round, 100.0)])
    assert rates.bytes_per_s == 64 * 32 * 4 / (1 / 2)
    assert rates.flops == ((1, 64 * 32 * 2 * 1 * 2), (8, 64 * 32 * 2 * 8 * 2))


def test_virtual_devices_have_a_part_of_the_machine_each():
    one, four = cpu_cluster(1, CPU_RATES), cpu_cluster(4, CPU_RATES)
    assert str(four) == "4 x cpu, 1 node of 4 over memory" and four.platform == "cpu"
    assert four.rates == CPU_RATES.shared(4)
    assert four.rates.bytes_per_s == 5e9 and four.rates.layer_s == 8e-4
    assert four.memory_bytes == pytest.approx(one.memory_bytes / 4, rel=0.2)  # of what other programs leave
    assert four.link.latency_s > one.link.latency_s > 0 and four.link.bytes_per_s < one.link.bytes_per_s


def test_steps_are_timed_where_and_for_as_long_as_they_should():
    """What a step writes shows where it was: pages 1 to 4 are the first row's, of 16 tokens each, then the second's."""
    definition = ModelDefinition.create(TINY, Partitioner.create(devices=jax.devices()[:1]), jnp.dtype("float32"))
    loads = [Load(2, 40), Load(0, 0, 32, 32)]  # a chunk of 32 tokens from position 16 on
    timer = StepTimer(definition, definition.init(), loads, page_size=16, backend="xla", num_steps=4)

    def written() -> list[tuple[int, int]]:
        ((keys, _),) = timer._cache
        assert isinstance(keys, jax.Array)
        pages, _, rows, _ = jnp.nonzero(keys)
        return sorted(set(zip(pages.tolist(), rows.tolist(), strict=True)))

    assert timer.seconds(loads[0]) > 0
    first, second = 1 + 2, 1 + 4 + 2  # the third of each holds positions 32 to 47
    assert written() == [(page, row) for page in (first, second) for row in range(8, 12)]
    assert timer.seconds(loads[1]) > 0
    assert {(page, row) for page in (2, 3) for row in range(16)} <= set(written())
    timer.close()


def test_a_check_compares_what_is_computed_with_what_is_timed():
    cluster = cpu_cluster(1, CPU_RATES)
    load, chunk = Load(2, 16), Load(0, 0, 32, 16)
    steps = plan_check.check(TINY, cluster, [load, chunk], rounds=3, clock=itertools.count().__next__)
    decode, prefill = steps
    assert decode.seconds == [1 / 8] * 3 and prefill.seconds == [1] * 3
    assert decode.ratio == pytest.approx(8 * decode.predicted.total_s)
    record = json.loads(json.dumps(decode.record()))
    assert (record["rows"], record["context"], record["measured_ms"]) == (2, 16, 125)
    assert record["measured_iqr_ms"] == [125, 125]
    assert sum(record["predicted_of"].values()) == pytest.approx(record["predicted_ms"])


def test_a_check_uses_the_rates_of_its_own_rounds():
    """A machine on which everything takes a second, whatever the cluster said."""
    calibration = Calibration(plan_check.QUICK, clock=itertools.count().__next__)
    (step,) = plan_check.check(
        TINY, cpu_cluster(1, CPU_RATES), [Load(1, 16)], 1, calibration, itertools.count().__next__
    )
    expected = calibration.rates([calibration.run()])
    assert step.predicted.weights_s == pytest.approx(
        (4 * (64 * 32 + 32) + 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32)) / expected.bytes_per_s
    )


def test_the_check_runs(tmp_path: pathlib.Path):
    flags = ["--models=12m", "--layers=1", "--rounds=2", "--rows=1", "--contexts=16", "--chunk=32", "--quick"]
    flags.append(f"--output={tmp_path / 'plan.json'}")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "tools/plan_check.py", *flags]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "plan.json").read_text("utf-8"))
    (model,) = record["results"]
    assert model["model"] == "12m" and [step["rows"] for step in model["steps"]] == [1, 0]
    assert all(step["ratio"] > 0 for step in model["steps"])
