"""Settings of kernels: which are taken, how they are searched for, and how they are kept."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.tools import kernel_search, kernel_timing
from pallas_kernels import tuning
from pallas_kernels.paged_attention import AttentionSpec, triton_tuning
from pallas_kernels.paged_attention.tiling import Tuning

SPEC = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, page_size=16, scale=1.0, device_kind="NVIDIA H100")
MEASURED = {"max_rows": 32, "block_tokens": 128, "extra_items": 64, "min_blocks": 2, "num_warps": 8, "num_stages": 5}


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    return tmp_path


def entry(**changes: Any) -> dict[str, Any]:
    call = triton_tuning.tuned_for(SPEC, 2)
    return {"kernel": triton_tuning.kernel("decode"), "for": call, "settings": MEASURED, "record": {}} | changes


def test_what_was_measured_on_the_device_is_taken_as_it_is(folder: pathlib.Path):
    """Also blocks that would not fit every GPU. Other calls and devices have the defaults."""
    defaults = triton_tuning.tuning_of(SPEC, "decode", 2)
    kernel_search.keep(folder / "nvidia_h100.json", entry())
    assert triton_tuning.tuning_of(SPEC, "decode", 2) == Tuning(**MEASURED) != defaults
    others = {"head_dim": 128, "num_q_heads": 16, "value_dim": 32, "device_kind": "NVIDIA H200", "window": 9}
    for name, value in others.items():
        other = dataclasses.replace(SPEC, **{name: value})
        unknown = dataclasses.replace(other, device_kind=None)
        expected = Tuning(**MEASURED) if name == "window" else triton_tuning.tuning_of(unknown, "decode", 2)
        assert triton_tuning.tuning_of(other, "decode", 2) == expected
    assert (
        triton_tuning.tuning_of(SPEC, "prefill", 2) != Tuning(**MEASURED) != triton_tuning.tuning_of(SPEC, "decode", 4)
    )


def test_a_new_measurement_takes_the_place_of_the_old_one(folder: pathlib.Path):
    path = folder / "nvidia_h100.json"
    kernel_search.keep(path, entry())
    kernel_search.keep(path, other := entry(kernel=triton_tuning.kernel("prefill")))
    kernel_search.keep(path, newer := entry(settings=MEASURED | {"num_warps": 4}))
    assert json.loads(path.read_text()) == [other, newer]
    assert [*folder.iterdir()] == [path]


@pytest.mark.parametrize(
    ("name", "value"), [("block_tokens", 48), ("max_rows", 8), ("num_warps", 3), ("num_stages", 0), ("extra_items", 0)]
)
def test_settings_that_cannot_be_are_refused(name: str, value: int):
    with pytest.raises(ValueError, match=f"{name} is {value}; expected "):
        Tuning(**MEASURED | {name: value})


@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_kept_can_be_taken(path: pathlib.Path):
    for kept in tuning.read(path):
        Tuning(**kept["settings"])


def test_the_search_finds_the_best_one_step_at_a_time():
    def seconds(settings: Tuning) -> float:
        return abs(settings.block_tokens - 32) + abs(settings.num_stages - 5) + 1

    start, compared = Tuning(**MEASURED | {"num_stages": 2}), []

    def speedup(old: Tuning, new: Tuning) -> float:
        compared.append(new)
        changed = [name for name, value in dataclasses.asdict(old).items() if getattr(new, name) != value]
        assert len(changed) == 1
        return seconds(old) / seconds(new)

    best = kernel_search.search(start, kernel_search.LADDERS, speedup, lambda: False)
    assert best == dataclasses.replace(start, block_tokens=32, num_stages=5)
    assert len(set(compared)) == len(compared)
    assert kernel_search.search(start, kernel_search.LADDERS, speedup, lambda: True) == start


@dataclasses.dataclass(frozen=True)
class FakeTimer:
    """Of settings that take as many seconds as they have stages; six do not fit, and five are wrong."""

    settings: Tuning

    def __post_init__(self):
        if self.settings.num_stages == 6:
            raise jax.errors.JaxRuntimeError("out of shared memory\nand more")

    @property
    def result(self) -> float:
        return float("nan") if self.settings.num_stages == 5 else 1e-3


class FakeWork:
    q, turns = None, (None,)

    def ours(self, name: str, *, tuning: Tuning) -> Tuning:
        assert name == "triton"
        return tuning

    def error(self, out: float) -> float:
        return out


@pytest.fixture
def speedup(monkeypatch: pytest.MonkeyPatch) -> kernel_search.Speedup:
    def medians(timers: dict[str, FakeTimer], _: int) -> dict[str, int]:
        return {name: timer.settings.num_stages for name, timer in timers.items()}

    monkeypatch.setattr(kernel_search, "medians", medians)
    monkeypatch.setattr(kernel_search, "Timer", lambda operation, *_: FakeTimer(operation))
    return kernel_search.Speedup({"case": FakeWork()}, 1, 1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("num_stages", "expected"), [(2, 2.0), (4, 1.0), (5, 0.0), (6, 0.0)])
def test_what_does_not_compile_or_is_wrong_is_not_faster(speedup: Any, num_stages: int, expected: float):
    old = Tuning(**MEASURED | {"num_stages": 4})
    assert speedup(old, dataclasses.replace(old, num_stages=num_stages)) == expected


@pytest.mark.parametrize("is_update", [False, True])
def test_what_is_timed_is_computed_in_each_call(is_update: bool):
    """Nothing of a loop's body is left out, or moved out of it; what is updated is updated in place."""
    x, y = jnp.full((64, 64), 1 / 64), jnp.ones((64, 64))
    timer = kernel_timing.Timer(jnp.matmul, x, [y, 2 * y], 5, is_update=is_update)
    body = re.findall(r"^%?\S*(?:body|region|while)\S* .*?^}", timer._loop.as_text() or "", re.DOTALL | re.MULTILINE)
    assert sum(len(re.findall(r" dot\(|custom-call\(|__ynn_fusion|__onednn", text)) for text in body) >= 2
    memory = timer._loop.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes >= x.nbytes
    if not is_update:
        np.testing.assert_allclose(timer.result, x @ y, rtol=1e-5)
    np.testing.assert_array_equal(x, 1 / 64)  # whoever else has it still has it
