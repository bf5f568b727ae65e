"""What `plan_mesh` computes for GPUs, beside what others published of engines there.

No GPU is needed, and none was measured: this says that the arithmetic and the assumed efficiencies are about right, and
for which kind of step they are wrong by how much.
"""

import functools
import math
import statistics
from typing import NamedTuple

import pytest

from jaxinfer.planning.loads import Load
from jaxinfer.planning.roofline import MeshModel
from tests import plans

_FACTOR = 1.25  # that a prediction may be off by, either way


class Anchor(NamedTuple):
    """A published decode step of a bfloat16 model, and our prediction as a share of it."""

    model: str
    devices: str
    mesh: str
    rows: int
    context: int
    published_ms: float
    ratio: float


_8B, _70B = "llama_3_1_8b_instruct", "llama_3_1_70b_instruct"
ANCHORS = {
    # vLLM 0.19 with FlashAttention 3, its blog of 2026-04-22: 6.44 ms and 4.37e-5 ms for each token of context.
    "vLLM, H100, short": Anchor(_8B, "h100", "data:1", 1, 128, 6.446, 1.16),
    "vLLM, H100, 32k": Anchor(_8B, "h100", "data:1", 1, 32768, 7.872, 1.13),
    # vLLM's CI, build 9515, the latency benchmark of 32 tokens in and 128 out; of Llama 3 70B, which has 3.1's shapes.
    "vLLM, H200": Anchor(_8B, "h200", "data:1", 8, 96, 6.51, 0.875),
    "vLLM, 4 x H200": Anchor(_70B, "h200:4", "tensor:4", 8, 96, 16.2, 0.90),
    # gpt-fast's README, 5 tokens in and 200 out: 93.9, 276 and 58.8 tokens/s. Its A100 are held at 330 W.
    "gpt-fast, A100": Anchor(_8B, "a100-80g", "data:1", 1, 105, 1e3 / 93.9, 1.06),
    "gpt-fast, 8 x A100": Anchor(_8B, "a100-80g:8", "tensor:8", 1, 105, 1e3 / 276, 0.90),
    "gpt-fast, 8 x A100, 70B": Anchor(_70B, "a100-80g:8", "tensor:8", 1, 105, 1e3 / 58.8, 0.95),
}


@functools.cache
def mesh_model(name: str, devices: str, mesh: str) -> MeshModel:
    return plans.candidate(plans.planner(name, devices).candidate(mesh)).model


def ratio(anchor: Anchor) -> float:
    load = Load(anchor.rows, anchor.context)
    return 1e3 * mesh_model(anchor.model, anchor.devices, anchor.mesh).step_time(load).total_s / anchor.published_ms


@pytest.mark.parametrize("name", ANCHORS)
def test_a_decode_step_takes_about_as_long_as_published(name: str):
    found = ratio(ANCHORS[name])
    assert found == pytest.approx(ANCHORS[name].ratio, abs=0.01)
    assert 1 / _FACTOR < found < _FACTOR


def test_the_predictions_are_centred():
    assert abs(statistics.fmean(math.log(ratio(anchor)) for anchor in ANCHORS.values())) < 0.05


def test_a_token_of_context_costs_what_was_published():
    model = mesh_model(_8B, "h100", "data:1")
    slope = (model.step_time(Load(1, 8192)).total_s - model.step_time(Load(1, 4096)).total_s) / 4096
    assert 1e3 * slope == pytest.approx(4.37e-5, rel=0.05)
