"""Metrics: what is counted, once each, and what Prometheus reads of it."""

import dataclasses
import random

import jax
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxinfer.compilations import num_compilations
from jaxinfer.metrics import _SERIES, EngineMetrics
from jaxinfer.request import FinishReason, Request
from jaxinfer.request_stats import BUCKETS_S, Histogram
from tests.fake_runner import POISON, make_core, make_request, run


def histogram(*values: float) -> Histogram:
    result = Histogram()
    for value in values:
        result = result.plus(value)
    return result


def read(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels, of a text in which no sample stands twice."""
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type != "unknown"
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in samples.setdefault(sample.name, {})
            samples[sample.name][labels] = sample.value
    return samples


def some_metrics() -> EngineMetrics:
    core = make_core(page_size=4, pages_per_shard=17, slots_per_shard=3)
    run(core, [make_request(i, [i] * 20, 30) for i in range(5)])
    return core.metrics(0)


def test_a_histogram_counts_by_bucket():
    values = histogram(0.0, BUCKETS_S[0], 0.3, 0.3, 1e9)
    assert values.counts[0] == 2 and values.counts[BUCKETS_S.index(0.5)] == 2 and values.counts[-1] == 1
    assert values.count == 5 and values.sum == pytest.approx(1e9 + 0.6 + BUCKETS_S[0])
    assert Histogram().count == 0 and Histogram().mean is None and histogram(1.0, 2.0).mean == 1.5


def test_percentiles_are_within_the_bucket_that_holds_them():
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(-2.0, 1.5, 2000))
    measured = histogram(*values.tolist())
    for percent in (1, 10, 50, 90, 99, 100):
        exact = float(np.percentile(values, percent))
        bucket = next(i for i, bound in enumerate(BUCKETS_S) if exact <= bound)
        estimate = measured.percentile(percent)
        assert estimate is not None and BUCKETS_S[bucket - 1] <= estimate <= BUCKETS_S[bucket]
    assert Histogram().percentile(50) is None
    assert histogram(1e9).percentile(50) == BUCKETS_S[-1]
    with pytest.raises(ValueError, match=r"percent=101: must be in \[0, 100\]"):
        measured.percentile(101)


def test_every_request_ends_once_and_every_token_counts_once():
    """Random aborts, preemptions and a failure, against what the requests themselves say in the end."""
    core, rng = make_core(page_size=4, pages_per_shard=25, num_shards=2), random.Random(0)
    requests: list[Request] = []
    for number in range(200):
        requests.append(make_request(number, [rng.randrange(9)] * rng.randint(1, 40), rng.randint(1, 20)))
        core.scheduler.add(requests[-1])
        if rng.random() < 0.3:
            core.abort(rng.choice(requests))
        core.step()
    core.runner.fail_at = "read"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RuntimeError, match="failed at read"):
        run(core, [])
    run(core, [])
    metrics = core.metrics(0)
    reasons = [request.finish_reason for request in requests]
    assert metrics.finished == {reason: reasons.count(reason) for reason in FinishReason}
    assert metrics.num_preemptions > 0 and min(metrics.finished[r] for r in ("abort", "error", "length")) > 0
    assert metrics.generation_tokens == sum(len(r.output_token_ids) for r in requests)
    started = [r for r in requests if r.start_time is not None]
    assert len(started) < len(requests)
    assert metrics.prompt_tokens == sum(r.num_prompt_tokens for r in started)
    assert metrics.num_steps == core.stats.steps
    assert (metrics.num_running, metrics.num_waiting, metrics.kv_cache_usage) == (0, 0, 0.0)


def test_running_and_waiting_requests_and_their_pages_show():
    core = make_core(page_size=4, pages_per_shard=17, slots_per_shard=2)
    for number in range(3):
        core.scheduler.add(make_request(number, [number] * 15, 9))
    core.step()
    core.step()
    metrics = core.metrics(0)
    assert (metrics.num_running, metrics.num_waiting, metrics.kv_cache_usage) == (2, 1, 8 / 16)


def test_the_hit_rate_counts_each_prompt_when_it_is_first_admitted():
    """One that comes back after a preemption finds its own pages: that is no hit."""
    core = make_core(page_size=4, max_num_batched_tokens=64)
    assert core.metrics(0).prefix_cache_hit_rate == 0
    for number in range(2):
        run(core, [make_request(number, [*range(41)], 3)])
    assert core.metrics(0).prefix_cache_hit_rate == 40 / 82
    assert some_metrics().num_preemptions > 0 and some_metrics().cached_prompt_tokens == 0
    assert some_metrics().prompt_tokens == 100


def test_the_times_of_a_request():
    request = make_request(0, [1, 2], 3)
    assert dataclasses.astuple(request.metrics) == (None,) * 4
    request.arrival_time, request.start_time, request.first_token_time = 10.0, 11.0, 13.0
    assert dataclasses.astuple(request.metrics) == (1.0, 3.0, None, None)
    request.append([5, 6, 7])
    request.finish_time = 17.0
    assert dataclasses.astuple(request.metrics) == (1.0, 3.0, 2.0, 7.0)
    single = make_request(0, [1, 2], 1)
    single.append([5])
    assert single.metrics.e2e_s is not None and single.metrics.tpot_s is None


def test_latencies_are_those_of_requests_that_came_to_their_own_end():
    core = make_core()
    aborted, failed = make_request(0, [1], 20), make_request(1, [POISON], 5)
    core.scheduler.add(aborted)
    for _ in range(3):
        core.step()
    core.abort(aborted)
    run(core, [failed, make_request(2, [3], 5), make_request(3, [3], 1)])
    metrics = core.metrics(0)
    assert aborted.first_token_time is not None and sum(metrics.finished.values()) == 4
    assert [metrics.queue_s.count, metrics.ttft_s.count, metrics.tpot_s.count, metrics.e2e_s.count] == [2, 2, 1, 2]
    assert 0 < metrics.queue_s.sum < metrics.ttft_s.sum < metrics.e2e_s.sum


def test_a_snapshot_stays_as_it_was():
    core = make_core()
    before = core.metrics(0)
    run(core, [make_request(0, [3], 5)])
    assert before.finished["length"] == 0 and before.e2e_s.count == 0
    with pytest.raises(TypeError):
        before.finished["length"] = 1  # pyright: ignore[reportIndexIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.num_steps = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_prometheus_reads_every_metric():
    metrics = dataclasses.replace(some_metrics(), expert_tokens={1: (3, 0, 5), 4: (1, 2, 0)})
    samples = read(metrics.prometheus_text())
    assert all(name.startswith("jaxinfer_") for name in samples)
    assert {field.name for field in dataclasses.fields(metrics)} | {"prefix_cache_hit_rate"} == set(_SERIES)
    for attribute, (kind, name, _) in _SERIES.items():
        name, value = "jaxinfer_" + name, getattr(metrics, attribute)
        if isinstance(value, Histogram):
            assert samples[f"{name}_count"][()] == value.count > 0
            assert samples[f"{name}_sum"][()] == value.sum
            buckets = {float(dict(labels)["le"]): count for labels, count in samples[f"{name}_bucket"].items()}
            assert [*buckets] == sorted([*BUCKETS_S, float("inf")])
            assert [*buckets.values()] == np.cumsum(value.counts).tolist()
        elif attribute == "finished":
            assert samples[name] == {(("reason", reason),): count for reason, count in value.items()}
        elif attribute == "expert_tokens":
            labels = lambda layer, expert: (("expert", str(expert)), ("layer", str(layer)))  # noqa: E731
            counts = {labels(layer, i): n for layer, of_layer in value.items() for i, n in enumerate(of_layer)}
            assert samples[name] == counts and len(counts) == 6
        else:
            assert samples[name] == {(): value}
            assert name.endswith("_total") == (kind == "counter")


def test_a_label_may_hold_anything():
    name = 'a "model"\\n of\ntwo lines, {x="y"}'
    for samples in read(some_metrics().prometheus_text(model_name=name)).values():
        assert all(dict(labels)["model_name"] == name for labels in samples)


def test_compilations_are_counted():
    before = num_compilations()
    jax.jit(lambda x: x * 5 + before)(np.arange(3.0, dtype=np.float32))
    assert num_compilations() == before + 1
