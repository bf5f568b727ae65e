"""The arithmetic of plans: clusters, the time of a step, what is best. All of it by hand."""

import dataclasses
from typing import Any

import pytest

from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.config import MoEConfig
from jaxinfer.layouts import Layout
from jaxinfer.planning import plan
from jaxinfer.planning.candidates import Candidate, Rejection, ranked
from jaxinfer.planning.clusters import Cluster, Efficiency, Rates, gpu_cluster, parse_devices
from jaxinfer.planning.hardware import GPUS, Link
from jaxinfer.planning.loads import AttentionLoad, LayerKind, Load
from jaxinfer.planning.meshes import dividing, meshes
from jaxinfer.planning.roofline import Collective, MeshModel
from jaxinfer.planning.weight_shapes import DeviceWeights, MeshWeights
from jaxinfer.planning.workload import Workload, best_rows, predict
from sharding_rules import axes as ax
from tests import plans, published

FAST = Link(name="fast", bytes_per_s=1e6, latency_s=0.5)
SLOW = Link(name="slow", bytes_per_s=1e5, latency_s=2.0)
RATES = Rates(
    bytes_per_s=1000.0,
    flops=((1, 4000.0),),
    attention_bytes_per_s=1000.0,
    attention_flops=2000.0,
    logits_per_s=31.25,
    layer_s=0.25,
    token_s=0.0,
    step_s=1.0,
)
ATTENTION = AttentionLoad(num_q_heads=2, head_dim=4, out_dim=4, token_bytes=16, window=None)


def cluster(num_nodes: int = 1, devices_per_node: int = 8) -> Cluster:
    return Cluster(
        name="h100",
        device_kind="NVIDIA H100 80GB HBM3",
        platform="gpu",
        memory_bytes=10**9,
        rates=RATES,
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        link=FAST,
        network=SLOW,
    )


def mesh_model(mesh: str = "", sharding: str = "auto", **changes: Any) -> MeshModel:
    """Of a layer of 100 numbers in 2 bytes each, and a head of 50."""
    layer = DeviceWeights(num_bytes=200, dense_bytes=200, dense_numbers=100)
    head = DeviceWeights(num_bytes=100, dense_bytes=100, dense_numbers=50)
    splits = Layout.create(mesh, sharding)
    fields: dict[str, Any] = {
        "cluster": cluster(),
        "splits": splits,
        "weights": MeshWeights(DeviceWeights(), head, (layer,) * splits.axis_size(ax.STAGE), 300),
        "layers": (LayerKind(ATTENTION, has_experts=False, num_slots=3),),
        "moe": None,
        "embed_dim": 5,
        "vocab_size": 10,
        "itemsize": 2,
        "is_exchanged": False,
    }
    return MeshModel(**fields | changes)


def test_a_step_takes_what_it_reads_or_multiplies():
    """One row: 300 bytes at 1000 a second against 300 FLOPs at 4000. 40 rows: twelve thousand FLOPs."""
    alone = mesh_model().step_time(Load(rows=1, context=100))
    assert (alone.weights_s, alone.products_s, alone.collectives_s, alone.fill_s) == (pytest.approx(0.3), 0, 0, 0)
    assert alone.attention_s == pytest.approx(3 * (16 * 100 / 1000 + 2 * 2 * 8 * 100 / 2000))
    assert alone.sampling_s == pytest.approx(8 * 4 * 10 / 1000)
    assert alone.overhead_s == pytest.approx(3 * 0.25 + 1)
    assert alone.total_s == pytest.approx(0.3 + 9.6 + 0.32 + 1.75)
    assert alone.bound == "attention"
    many = mesh_model().step_time(Load(rows=40, context=1))
    assert (many.weights_s, many.products_s) == (0, pytest.approx(40 * 2 * 150 / 4000))


@pytest.mark.parametrize(
    ("mesh", "load", "flops", "num_bytes"),
    [
        ("", Load(rows=2, context=100), 2 * 2 * 150 + 3 * 2 * 32 * 100, 300 + 3 * 2 * 16 * 100),
        ("context:2", Load(rows=2, context=100), 2 * 2 * 150 + 3 * 32 * 100, 300 + 3 * 16 * 100),
        ("stage:2", Load(rows=2, context=100), 2 * 2 * 150 + 3 * 2 * 32 * 100, 2 * 300 + 3 * 2 * 16 * 100),
        ("", Load(0, 0, 100, 50), 2 * 100 * 100 + 2 * 50 + 3 * 100 * 32 * 50, 300 + 3 * 16 * 100),
    ],
)
def test_work_is_what_the_time_is_of(mesh: str, load: Load, flops: float, num_bytes: float):
    """A query of 2 heads takes 2 * 2 * (4 + 4) FLOPs for each token that it sees. Microbatches read all weights."""
    model = mesh_model(mesh)
    assert model.work(load) == pytest.approx((flops, num_bytes))
    assert model.step_time(load).total_s > max(flops / 4000, num_bytes / 1000)


def test_prompts_are_multiplied_by_the_layers_and_their_last_tokens_by_the_head():
    step = mesh_model().step_time(Load(rows=0, context=0, chunk_tokens=100, chunk_context=50))
    assert step.products_s == pytest.approx(100 * 2 * 100 / 4000)
    assert step.weights_s == pytest.approx(0.1)  # the head's, for one token
    assert step.attention_s == pytest.approx(3 * (16 * 100 / 1000 + 100 * 2 * 2 * 8 * 50 / 2000))


def test_a_window_is_what_is_read():
    windowed = LayerKind(ATTENTION._replace(window=10), has_experts=False, num_slots=3)
    step = mesh_model(layers=(windowed,)).step_time(Load(rows=1, context=100))
    assert step.attention_s == pytest.approx(3 * (16 * 10 / 1000 + 2 * 2 * 8 * 10 / 2000))


@pytest.mark.parametrize(
    ("load", "seen", "read"),
    [
        (Load(0, 0, 20, 10), 10, 20),
        (Load(0, 0, 40, 20), (30 * 15 + 10 * 30) / 40, 40),  # ten tokens see no more than the window
        (Load(0, 0, 40, 70), 30, 30 + 40),  # of which the first begins 30 before
        (Load(0, 0, 40, 50, chunk_spread=100), (30 * 15 + 70 * 30) / 100, 30 + 40),  # some of a prompt's 100
        (Load(0, 0, 40, 10, chunk_spread=20, num_prompts=2), 10, 2 * 20),
    ],
)
def test_what_prompts_see_and_read_of_a_window(load: Load, seen: float, read: float):
    flops, num_bytes = ATTENTION._replace(window=30).chunk_work(load)
    assert flops == pytest.approx(load.chunk_tokens * 32 * seen)
    assert num_bytes == pytest.approx(16 * read)


def test_tokens_and_layers_cost_what_is_too_small_to_count():
    slow = dataclasses.replace(cluster(), rates=dataclasses.replace(RATES, token_s=0.125))
    load = Load(rows=0, context=0, chunk_tokens=100, chunk_context=50)
    more = mesh_model(cluster=slow).step_time(load).overhead_s - mesh_model().step_time(load).overhead_s
    assert more == pytest.approx(3 * 100 * 0.125)


def test_products_of_more_tokens_are_faster_in_between_evenly():
    """From one token to a hundred a hundred times as fast, so of ten ten times."""
    rates = dataclasses.replace(RATES, flops=((1, 10.0), (100, 1000.0), (101, 500.0)))
    assert [rates.flops_at(n) for n in (0.5, 1, 100, 101, 5000)] == pytest.approx([10, 10, 1000, 500, 500])
    assert rates.flops_at(10) == pytest.approx(100)
    assert RATES.flops_at(7) == 4000


def test_devices_that_share_a_machine_have_a_part_of_it():
    """Four of them do in four times the time what one does."""
    load = Load(rows=2, context=100, chunk_tokens=10, chunk_context=5)
    alone, shared = (
        mesh_model(cluster=dataclasses.replace(cluster(), rates=rates)).step_time(load)
        for rates in (RATES, RATES.shared(4))
    )
    assert shared.total_s == pytest.approx(4 * alone.total_s)


def test_dispatches_of_several_steps_share_what_a_step_costs():
    one, eight = (mesh_model().step_time(Load(1, 1), num_steps) for num_steps in (1, 8))
    assert one.overhead_s - eight.overhead_s == pytest.approx(1 - 1 / 8)


def test_a_pipeline_is_filled_once_for_each_dispatch():
    """Two stages of half the layers each take two microbatches of one row: two turns a token, and one to fill."""
    load = Load(rows=2, context=100)
    model = mesh_model("stage:2")
    turn = (model._turn_time(load._replace(rows=1)) + model._head_time(load._replace(rows=1))).total_s
    assert model.step_time(load, 1).fill_s == pytest.approx(turn)
    assert model.step_time(load, 10).fill_s == pytest.approx(turn / 10)
    assert model.step_time(load, 1).weights_s == pytest.approx(2 * 0.3)  # read for each microbatch
    assert model.num_microbatches(load) == 2
    assert model.num_microbatches(Load(rows=2, context=1, chunk_tokens=2048)) == 8  # of 256 tokens


def test_experts_are_read_as_they_are_touched():
    """Of 8 experts with 2 for each token: a quarter by one token, 1 - 0.75 ** 4 by four."""
    moe = MoEConfig(num_experts=8, num_experts_per_token=2, mlp_dim=4)
    layer = DeviceWeights(num_bytes=800, expert_bytes=800, expert_numbers=100)
    weights = MeshWeights(DeviceWeights(), DeviceWeights(), (layer,), 800)
    kinds = (LayerKind(ATTENTION, has_experts=True, num_slots=1),)
    model = mesh_model(moe=moe, weights=weights, layers=kinds)
    assert model.step_time(Load(1, 1)).weights_s == pytest.approx(0.25 * 0.8)
    assert model.step_time(Load(4, 1)).weights_s == pytest.approx((1 - 0.75**4) * 0.8)
    split = mesh_model("expert:4", moe=moe, weights=weights, layers=kinds, is_exchanged=True)
    assert split.step_time(Load(1, 1)).weights_s == pytest.approx((1 - 0.75**4) * 0.8)  # the tokens of four devices


def test_collectives_take_a_ring():
    """A sum of n bytes over g devices sends 2 (g - 1) / g n, gathering or exchanging half of it."""
    assert Collective("all-reduce", ("tensor",), 1e6).seconds(4, FAST) == pytest.approx(0.5 + 2 * 0.75)
    assert Collective("all-gather", ("tensor",), 1e6).seconds(4, FAST) == pytest.approx(0.5 + 0.75)
    assert Collective("all-to-all", ("expert",), 1e6, 2).seconds(4, FAST) == pytest.approx(2 * (0.5 + 0.75))
    assert Collective("collective-permute", ("stage",), 1e6).seconds(2, FAST) == pytest.approx(1.5)
    assert Collective("all-reduce", ("tensor",), 1e6).seconds(1, FAST) == 0


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ("tensor:2", ["all-reduce tensor 20", "all-reduce tensor 20"]),
        ("data:2", ["all-reduce  20", "all-reduce  20"]),
        (
            "context:2,tensor:2",
            [
                "all-reduce context 16",
                "all-reduce context 80",
                "all-reduce tensor 20",
                "all-reduce context,tensor 20",
            ],
        ),
    ],
)
def test_what_travels_in_a_layer(mesh: str, expected: list[str]):
    """Of two tokens of 5 numbers in 2 bytes; parts of attention have 2 heads of 4 + 1 numbers in float32, and 1."""
    model = mesh_model(mesh)
    found = model.layer_collectives(model.layers[0], 2)
    assert [f"{c.op} {','.join(c.mesh_axes)} {c.num_bytes}" for c in found] == expected


@pytest.mark.parametrize("sharding", ["auto", "expert_sums"])
def test_what_travels_for_experts(sharding: str):
    moe = MoEConfig(num_experts=8, num_experts_per_token=2, mlp_dim=4)
    model = mesh_model("expert:2", sharding, moe=moe, is_exchanged=sharding == "auto")
    found = model.layer_collectives(LayerKind(ATTENTION, has_experts=True, num_slots=1), 3)
    experts = [(c.op, c.num_bytes, c.times) for c in found if "expert" in c.mesh_axes]
    heads = [] if sharding == "auto" else [("all-reduce", 30, 1)]
    assert experts == heads + [("all-to-all", 60, 4) if sharding == "auto" else ("all-reduce", 30, 1)]


@pytest.mark.parametrize(
    ("mesh", "axes", "name"),
    [
        ({"tensor": 8}, ["tensor"], "fast"),
        ({"data": 2, "tensor": 8}, ["tensor"], "fast"),
        ({"data": 2, "tensor": 8}, ["data"], "slow"),
        ({"stage": 4, "tensor": 4}, ["stage"], "slow"),
        ({"stage": 4, "expert": 2, "tensor": 2}, ["expert", "tensor"], "fast"),
        ({"tensor": 16}, ["tensor"], "slow"),
        ({"expert": 1, "tensor": 8}, ["expert"], "fast"),
        ({"stage": 3, "tensor": 2}, ["stage"], "fast"),  # all of it is on one node
        ({"stage": 3, "tensor": 4}, ["stage"], "slow"),
    ],
)
def test_the_axes_that_leave_a_node_are_the_first(mesh: dict[str, int], axes: list[str], name: str):
    assert cluster(2, 8).link_of(axes, mesh).name == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("h100:8", ("h100", 1, 8)),
        ("h100", ("h100", 1, 1)),
        ("H200:2x8", ("h200", 2, 8)),
        ("h100:16", ("h100", 2, 8)),
        ("a6000-48g:4", ("a6000-48g", 1, 4)),
        ("a6000-48g:8", ("a6000-48g", 2, 4)),
        ("cpu", ("cpu", 1, 1)),
        ("cpu:16", ("cpu", 1, 16)),
    ],
)
def test_devices_as_they_are_spelled(text: str, expected: tuple[str, int, int]):
    assert parse_devices(text) == expected


def test_as_many_on_a_node_as_are_given():
    assert parse_devices("h100:16", devices_per_node=4) == ("h100", 4, 4)
    assert parse_devices("h100:2", devices_per_node=4) == ("h100", 1, 2)
    assert parse_devices("h100:2x4", devices_per_node=4) == ("h100", 2, 4)


@pytest.mark.parametrize(
    ("text", "per_node", "message"),
    [
        ("h100:0", None, "must be 1 to 4096 devices"),
        ("h100:0x8", None, "must be 1 to 4096 devices"),
        ("h100:1000x1000", None, "must be 1 to 4096 devices"),
        ("h101:8", None, "unknown device 'h101'; did you mean 'h100'"),
        ("h100:-2", None, "must be a device and how many"),
        ("h100:8.5", None, "must be a device and how many"),
        ("", None, "must be a device and how many"),
        ("h100:12", None, "12 devices are no nodes of 8"),
        ("h100:8", 0, "--num_gpus_per_node=0: must be at least 1"),
        ("h100:2x8", 4, "has 8 on a node and --num_gpus_per_node=4"),
    ],
)
def test_devices_that_there_are_not(text: str, per_node: int | None, message: str):
    with pytest.raises(ValueError, match=message):
        parse_devices(text, devices_per_node=per_node)


def test_gpus_are_what_their_names_say():
    for name, gpu in GPUS.items():
        _, _, size = name.partition("-")
        if size:
            assert 0.9 < gpu.memory_bytes / 2**30 / int(size.removesuffix("g")) < 1, name
        assert 70 < gpu.flops / gpu.bandwidth < 500, name  # tokens at once from which arithmetic counts


def test_every_mesh_once():
    """Ordered ways to write 8 as a product of five factors: 35; of 12 over four axes: 40."""
    found = [tuple(sizes.items()) for sizes in meshes(8)]
    assert len(found) == len(set(found)) == 35
    assert len([*meshes(12, (ax.DATA, ax.STAGE, ax.CONTEXT, ax.TENSOR))]) == 40
    assert [*meshes(1)] == [{"data": 1}]


def test_the_meshes_that_divide():
    """40 heads over 16 devices: 8 of tensor at most; 40 layers take any number of stages."""
    weights = plans.planner("llama_2_13b", "h100").weights
    found = dividing(weights, 16, "auto")
    assert found[:3] == ["context:2,tensor:8", "stage:2,tensor:8", "data:2,tensor:8"]
    assert "stage:16" in found and not any("tensor:16" in mesh or "expert" in mesh for mesh in found)


WORKLOAD = Workload(prompt_tokens=100, output_tokens=10)


def prefill_load(chunk_tokens: int, rows: int) -> Load:
    """Of WORKLOAD's prompts."""
    return Load(rows, 105, chunk_tokens, 50, chunk_spread=100, num_chunks=max(1, rows))


def test_a_request_alone():
    """Ten tokens and a hundred of prompt, in steps of at most 40: three, then ten."""
    found = predict(mesh_model(), WORKLOAD, 1, ChunkPolicy(40), 1)
    prefill, last = (mesh_model().step_time(prefill_load(size, rows=0)).total_s for size in (40, 20))
    decode = mesh_model().step_time(Load(1, 105)).total_s
    assert found.ttft_s == pytest.approx(2 * prefill + last)
    assert found.tpot_s == pytest.approx(decode)
    assert found.request_s == pytest.approx(2 * prefill + last + 9 * decode)
    assert found.tokens_per_s == pytest.approx(10 / found.request_s)


def test_requests_together_prefill_beside_each_others_decoding():
    """Four of 99 tokens in each of two shards, with 3 + 9 steps each: all 12 prefill, 4 * 99 / 12 tokens in each."""
    model, asked = mesh_model("data:2"), dataclasses.replace(WORKLOAD, prompt_tokens=99)
    found = predict(model, asked, 4, ChunkPolicy(40), 1)
    mixed = model.step_time(Load(4, 104, 33, 49.5, chunk_spread=99, num_chunks=4)).total_s
    assert found.num_seqs == 8
    assert found.tokens_per_s == pytest.approx(8 * 10 / (12 * mixed))
    assert found.requests_per_s == pytest.approx(found.tokens_per_s / 10)
    assert found.tpot_s == pytest.approx(mixed) and found.ttft_s == pytest.approx(3 * mixed)


def test_prompts_do_not_wait_for_each_other_where_there_are_steps_enough():
    """Two with 100 further tokens: 2 + 100 steps, of which 4 prefill; a row decodes beside the other's two."""
    model, asked = mesh_model(), dataclasses.replace(WORKLOAD, output_tokens=101)
    found = predict(model, asked, 2, ChunkPolicy(52), 1)
    mixed = model.step_time(prefill_load(50, rows=2)._replace(context=150.5)).total_s
    decode = model.step_time(Load(2, 150.5)).total_s
    assert found.ttft_s == pytest.approx(2 * mixed)
    assert found.tpot_s == pytest.approx((2 * mixed + 98 * decode) / 100)
    assert found.tokens_per_s == pytest.approx(2 * 101 / (4 * mixed + 98 * decode))


def test_short_prompts_are_prefilled_together():
    """40 of 10 tokens and 9 further ones each: 4 in a step, as ten steps are all that there are."""
    model, asked = mesh_model(), dataclasses.replace(WORKLOAD, prompt_tokens=10)
    found = predict(model, asked, 40, ChunkPolicy(200), 1)
    load = Load(40, 15, 40, 5, chunk_spread=10, num_prompts=4, num_chunks=8)
    assert found.prefill_load == load
    assert found.tokens_per_s == pytest.approx(40 * 10 / (10 * model.step_time(load).total_s))
    assert found.ttft_s == pytest.approx(model.step_time(load).total_s)


def test_prompts_are_padded_as_the_scheduler_pads_them():
    """70 tokens in a step for 128; 60 in one of 32 and one for the rest, because half of 128 would be padding."""
    policy = ChunkPolicy(1000, (32, 128))
    model = mesh_model()

    def ttft(prompt_tokens: int) -> float:
        return predict(model, dataclasses.replace(WORKLOAD, prompt_tokens=prompt_tokens), 1, policy, 1).ttft_s

    def step_s(chunk_tokens: int, padding: int, prompt_tokens: int) -> float:
        load = Load(0, 0, chunk_tokens, prompt_tokens / 2, chunk_spread=prompt_tokens, padding=padding)
        return model.step_time(load).total_s

    assert ttft(70) == pytest.approx(step_s(70, 58, 70))
    assert ttft(60) == pytest.approx(step_s(32, 0, 60) + step_s(28, 4, 60))
    assert ttft(300) == pytest.approx(2 * step_s(128, 0, 300) + step_s(32, 0, 300) + step_s(12, 20, 300))


def test_prompts_wait_until_a_step_takes_many_of_them():
    """Of 45 tokens that come in a step's time it takes 32, or 128 when as many wait."""
    asked = dataclasses.replace(WORKLOAD, prompt_tokens=15, output_tokens=10)
    found = predict(mesh_model(), asked, 30, ChunkPolicy(1000, (32, 128)), 1)
    assert found.prefill_load.chunk_tokens == 8 * 15
    share = (45 - 32) / (120 - 32)
    few, many = (
        mesh_model().step_time(asked.prefill_load(n, 30, ChunkPolicy(1000, (32, 128)))).total_s for n in (32, 120)
    )
    assert found.tpot_s == pytest.approx((1 - share) * few + share * many)


def test_what_is_best_for_whom():
    model, asked = mesh_model(), Workload(prompt_tokens=1, output_tokens=50)
    of = lambda rows: predict(model, asked, rows, ChunkPolicy(2048), 1)  # noqa: E731
    throughput = best_rows(asked, 64, of)
    assert throughput.num_seqs > 32
    assert best_rows(dataclasses.replace(asked, objective="latency"), 64, of).num_seqs == 1
    busy = dataclasses.replace(asked, objective="latency", qps=1.5 * of(1).requests_per_s)
    served = best_rows(busy, 64, of)
    assert 1 < served.num_seqs < 8 and served.misses(busy) is None
    limited = dataclasses.replace(asked, tpot_s=1.5 * of(1).tpot_s)
    within = best_rows(limited, 64, of)
    assert within.misses(limited) is None and within.num_seqs < throughput.num_seqs


def test_more_sequences_are_not_always_more_tokens():
    """With 40 tokens a step, 40 sequences leave no room for prompts."""
    of = lambda rows: predict(mesh_model(), WORKLOAD, rows, ChunkPolicy(40), 1)  # noqa: E731
    assert best_rows(WORKLOAD, 40, of).num_seqs < 40


def test_what_is_missed_is_said():
    found = predict(mesh_model(), WORKLOAD, 1, ChunkPolicy(2048), 1)
    for limit in ("ttft_s", "tpot_s"):
        asked = dataclasses.replace(WORKLOAD, **{limit: getattr(found, limit) / 2})
        assert f"--{limit}=" in str(found.misses(asked))
    assert "--qps=1e+06" in str(found.misses(dataclasses.replace(WORKLOAD, qps=1e6)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "speed"}, "--objective=speed: unknown; did you mean"),
        ({"prompt_tokens": 0}, "--prompt_tokens=0: must be at least 1"),
        ({"qps": 0.0}, "--qps=0.0: must be above 0"),
        ({"tpot_s": float("nan")}, "--tpot_s=nan: must be above 0"),
    ],
)
def test_workloads_that_cannot_be(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Workload(**fields)


def found_of(**asked: Any) -> list[Candidate | Rejection]:
    return [*plans.planner("llama_3_1_8b_instruct", "h100:4", **asked).candidates()]


def test_the_best_is_first():
    planned = {objective: found_of(objective=objective) for objective in ("latency", "throughput", "cost")}
    best = {
        objective: ranked([c for c in found if isinstance(c, Candidate)], objective)
        for objective, found in planned.items()
    }
    assert best["latency"][0].mesh == "tensor:4"
    assert best["throughput"][0].mesh == "data:4"
    assert best["cost"][0].num_devices == 1 and len(planned["cost"]) > len(planned["throughput"])
    for objective, of in (
        ("latency", lambda c: c.performance.request_s),
        ("throughput", lambda c: -c.performance.tokens_per_s),
    ):
        assert [*map(of, best[objective])] == sorted(map(of, best[objective]))


def test_a_candidate_holds_all_its_sequences():
    for found in found_of(prompt_tokens=8000, output_tokens=1000):
        memory = plans.candidate(found).plan.memory
        assert memory.max_concurrency >= plans.candidate(found).performance.num_seqs


def test_limits_reject_meshes_with_their_numbers():
    rejected = [r for r in found_of(objective="latency", tpot_s=0.004) if isinstance(r, Rejection)]
    assert rejected
    assert all("tpot_s is 0.00" in r.reason and "--tpot_s=0.004" in r.reason for r in rejected)


def test_as_many_sequences_as_are_given():
    given = plans.planner("llama_3_1_8b_instruct", "h100:4", num_seqs=12)
    assert plans.candidate(given.candidate("data:4")).performance.num_seqs == 12
    assert "--max_num_seqs=13 does not divide over data:4; use 16" in plans.reason(
        plans.planner("llama_3_1_8b_instruct", "h100:4", num_seqs=13).candidate("data:4")
    )


def test_experts_are_split_both_ways_and_only_where_there_are_some():
    names = {found.mesh for found in plans.planner("mixtral_8x7b_instruct_v0_1", "h100:2").candidates()}
    assert {"expert:2", "expert:2 (expert_sums)"} <= names
    assert not any("expert" in found.mesh for found in found_of())


def test_experts_in_parts_are_summed_before_they_travel():
    """What each token gets of its experts comes together in one array of its own size, not in one for each expert."""
    moe = MoEConfig(num_experts=8, num_experts_per_token=4, mlp_dim=4)
    model = mesh_model("expert:2,tensor:2", "auto", moe=moe, is_exchanged=True)
    found = model.layer_collectives(LayerKind(ATTENTION, has_experts=True, num_slots=1), 3)
    sums = {c.num_bytes for c in found if c.op == "all-reduce"}
    assert len(sums) == 1


def test_sampling_is_over_the_whole_vocabulary_on_every_device():
    whole, split = (mesh_model(mesh).step_time(Load(4, 8)).sampling_s for mesh in ("", "tensor:2"))
    assert whole == split > 0


def test_products_of_float32_are_not_those_of_the_matrix_unit():
    cluster = gpu_cluster("h100", 1, 8, Efficiency())
    full = cluster.in_float32()
    assert full.rates.flops_at(512) == pytest.approx(cluster.rates.flops_at(512) * 67 / 989)
    assert full.rates.attention_flops < cluster.rates.attention_flops
    assert full.rates.bytes_per_s == cluster.rates.bytes_per_s
    model = published.read("llama_3_2_1b")
    for dtype, expected in (("bfloat16", cluster), ("float32", full)):
        assert plan.planner(model, {"dtype": dtype}, cluster, Workload()).cluster == expected


def test_a_vocabulary_that_does_not_divide_is_whole_in_plans_too():
    """50,257 of GPT-2: as the engine has it, so that nothing is gathered and the logits are not in parts."""
    asked = plans.planner("gpt2", "h100:2", prompt_tokens=480, output_tokens=32, num_seqs=32)
    assert asked.model.vocab_size % 2
    candidate = plans.candidate(asked.candidate("tensor:2"))
    assert not candidate.model.splits.mesh_axes(ax.VOCAB)
    assert candidate.plan.memory.temporary_bytes == 6 * 4 * (32 + 8) * 50_257  # of rows, and of chunks that end
