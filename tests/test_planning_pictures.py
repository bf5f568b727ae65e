"""Pictures of plans: bars for a terminal, pieces of arrays against what JAX does, and the files of `plot_plan`."""

import collections
import dataclasses
import pathlib
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET

import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.style
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from jaxinfer.layouts import Layout
from jaxinfer.parameters import model_weights
from jaxinfer.partitioning import Partitioner
from jaxinfer.planner import GIB, MIB, MemoryPlan, format_bytes
from jaxinfer.planning import drawing, plots
from jaxinfer.planning.bars import bar, columns, format_ms, memory_bars, memory_parts, step_bars
from jaxinfer.planning.candidates import Candidate, Planner, ranked
from jaxinfer.planning.pieces import cut, cut_weights
from jaxinfer.planning.roofline import StepTime
from sharding_rules import axes as ax
from tests import plans, published

LONGEST_MESH = "stage:2,expert:2,context:2,tensor:2 (expert_sums)"
STEP = StepTime(weights_s=0.012, products_s=0.004, attention_s=0.002, sampling_s=2e-7, collectives_s=0.001)


# Bars.


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=8), st.integers(8, 200))
def test_columns_add_up_and_hide_nothing(sizes: list[int], width: int):
    counts = columns(sizes, width)
    assert sum(counts) == width or not any(sizes)
    assert [count > 0 for count in counts] == [size > 0 for size in sizes] or not any(sizes)


def test_columns_are_in_proportion():
    assert columns([1, 98, 101], 20) == [1, 9, 10]
    assert columns([50, 25, 25], 8) == [4, 2, 2]
    assert columns([1, 1, 1], 2) == [1, 1, 1]  # too narrow: nothing is hidden


def memory_plan(**changes: int | None) -> MemoryPlan:
    fields = {"weights_bytes": 30 * GIB, "workspace_bytes": 512 * MIB, "page_bytes": GIB, "num_pages": 20} | changes
    sizes = {"kept_bytes": 0, "page_size": 64, "max_model_len": 64, "num_shards": 1, "context_size": 1}
    return MemoryPlan(**{"free_bytes": 70 * GIB} | fields | sizes)  # pyright: ignore[reportArgumentType]


def test_memory_parts_are_all_of_a_device():
    parts = memory_parts(memory_plan(), 0.9, 80 * GIB)
    assert parts["free"] == 63 * GIB - 50 * GIB - 512 * MIB  # 63: nine tenths of 70
    assert parts["reserve"] == 17 * GIB
    assert sum(parts.values()) == 80 * GIB
    assert memory_parts(memory_plan(free_bytes=None), 0.9, 80 * GIB)["reserve"] == 8 * GIB


def test_bars_of_memory():
    parts = memory_parts(memory_plan(), 0.9, 80 * GIB)
    assert memory_bars({"tensor:2": parts}).splitlines() == [
        "Memory of a device, 80.00 GiB:",
        "# weights  = cache  + workspace  . free  / reserve",
        "",
        "tensor:2  # 30.00 GiB  = 20.00 GiB  + 512.0 MiB  . 12.50 GiB  / 17.00 GiB",
        "#" * 30 + "=" * 20 + "+" + "." * 12 + "/" * 17,
    ]


def test_sizes_go_below_a_name_that_leaves_no_room():
    parts = memory_parts(memory_plan(), 0.9, 80 * GIB)
    lines = memory_bars({"tensor:2": parts, LONGEST_MESH: parts}).splitlines()
    assert lines[3] == "tensor:2" and lines[7] == LONGEST_MESH
    assert lines[4] == lines[8] == "# 30.00 GiB  = 20.00 GiB  + 512.0 MiB  . 12.50 GiB  / 17.00 GiB"


@pytest.mark.parametrize("width", [60, 80, 133])
def test_bars_are_as_wide_as_asked(width: int):
    parts = memory_parts(memory_plan(), 0.9, 80 * GIB)
    for text in (memory_bars({LONGEST_MESH: parts}, width), step_bars({LONGEST_MESH: STEP}, width)):
        lines = text.splitlines()
        assert len(lines[-1]) == width and max(map(len, lines)) == width


def test_bars_of_steps():
    """The longest has the width; what is left out is zero."""
    lines = step_bars({"tensor:2": STEP, "tensor:4": STEP * 0.5}).splitlines()
    assert lines[1] == "# reading weights  * arithmetic  = attention  + sampling  % collectives"
    assert lines[3] == "tensor:2  19.0 ms:  # 12.0 ms  * 4.00 ms  = 2.00 ms  + <0.001 ms  % 1.00 ms"
    assert len(lines[4]) == 80 and set(lines[4]) == set("#*=+%")
    assert len(lines[-1]) == 40 and set(lines[-1]) == set("#*=+%")


def test_marks_of_a_bar_tell_its_parts_apart():
    step = StepTime(**{field.name: 1.0 for field in dataclasses.fields(StepTime)})
    for parts in (step.parts, memory_parts(memory_plan(), 0.9, 80 * GIB)):
        assert len(set(bar(parts, 80))) == len(parts)


def test_milliseconds_have_three_digits():
    assert [*map(format_ms, (2e-7, 1.23e-5, 0.024, 1.5))] == ["<0.001 ms", "0.0123 ms", "24.0 ms", "1500 ms"]


# Pieces.


@pytest.mark.parametrize("mesh", ["", "tensor:2", "data:2,tensor:4", "expert:2,context:2,tensor:2", "stage:2,tensor:4"])
@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ((ax.VOCAB, ax.EMBED), (64, 8)),
        ((ax.HEADS, ax.HEAD_DIM, ax.EMBED), (8, 16, 8)),
        ((ax.EXPERTS, ax.EMBED, ax.EXPERT_MLP), (4, 8, 32)),
        (((ax.LAYERS, ax.PAGES), ax.KV_HEADS, None, ax.HEAD_DIM), (16, 8, 4, 8)),
        ((None, ax.EMBED), (4, 8)),
    ],
)
def test_pieces_are_those_of_jax(mesh: str, axes: ax.Dimensions, shape: tuple[int, ...]):
    partitioner = Partitioner.create(mesh)
    assert partitioner.mesh.devices is not None
    places = {device: place for place, device in enumerate(partitioner.mesh.devices.flat)}
    holders: dict[str, list[int]] = collections.defaultdict(list)
    for device, index in partitioner.sharding(axes, shape, "array").devices_indices_map(shape).items():
        holders[str(index)].append(places[device])
    pieces = cut(axes, shape, partitioner)
    assert sorted(pieces.devices.values()) == sorted(tuple(sorted(held)) for held in holders.values())
    assert pieces.num_pieces == len(holders) == pieces.rows.num_pieces * pieces.columns.num_pieces
    assert pieces.num_pieces * pieces.num_copies == len(places)


def test_what_is_drawn_is_what_is_cut():
    axes, shape = (ax.HEADS, ax.HEAD_DIM, ax.EMBED), (8, 16, 32)
    pieces = cut(axes, shape, Layout.create("data:2,tensor:4"))
    assert (pieces.rows.label, pieces.rows.over) == ("heads 8", "over tensor:4")
    assert (pieces.columns.label, pieces.columns.over) == ("embed 32", "")
    assert pieces.devices[1, 0] == (1, 5) and pieces.num_copies == 2
    whole = cut(axes, shape, Layout.create("data:2"))
    assert whole.rows.label == "heads 8"  # which another mesh would cut, though head_dim is larger


def test_a_stage_has_its_layers_to_itself():
    pieces = cut((ax.MLP, ax.EMBED), (8, 4), Layout.create("stage:2,tensor:2"), stage=1)
    assert pieces.devices == {(0, 0): (2,), (1, 0): (3,)} and pieces.num_copies == 1


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="mlp 9 does not divide over --mesh tensor:2"):
        cut((ax.MLP, ax.EMBED), (9, 4), Layout.create("tensor:2"))


def test_weights_that_are_cut_alike_are_one_kind():
    weights = model_weights(published.read("mixtral_8x7b_instruct_v0_1"), jnp.dtype("bfloat16"))
    kinds = cut_weights(weights, Layout.create("tensor:16"), most=9)
    names = [kind.names for kind in kinds]
    assert names[:2] == [("embedding/table", "head/table"), ("attention/k/weight", "attention/v/weight")]
    assert ("mlp/experts/gate", "mlp/experts/up") in names and ("mlp/router/weight",) in names
    assert kinds[1].weight.shape[0] == 16  # 8 KV heads, each twice
    assert [kind.layer for kind in kinds[:2]] == [None, 0]
    largest = cut_weights(weights, Layout.create("tensor:16"), most=2)
    assert [kind.names[0] for kind in largest] == ["mlp/experts/down", "mlp/experts/gate"]


def test_a_vocabulary_that_does_not_divide_is_whole():
    weights = model_weights(published.read("gpt2"), jnp.dtype("bfloat16"))
    (embedding,) = (kind for kind in cut_weights(weights, Layout.create("tensor:2"), 9) if ax.VOCAB in kind.weight.axes)
    assert embedding.pieces.num_pieces == 1 and embedding.pieces.num_copies == 2


# Files.


@pytest.fixture(scope="module")
def planned() -> tuple[Planner, list[Candidate]]:
    planner = plans.planner("mixtral_8x7b_instruct_v0_1", "h100:4", objective="latency")
    found = [found for found in planner.candidates() if isinstance(found, Candidate)]
    return planner, ranked(found, "latency")


def texts_of_svg(path: pathlib.Path) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_an_svg_has_the_numbers_as_text(tmp_path: pathlib.Path, planned: tuple[Planner, list[Candidate]]):
    planner, candidates = planned
    path = tmp_path / "plan.svg"
    plots.plot_plan(path, planner, candidates, "A model, and $5 <devices> $\non a second line")
    texts = texts_of_svg(path)
    best = candidates[0]
    assert "A model, and $5 <devices> $" in texts and "on a second line" in texts
    for candidate in candidates[: plots.MOST_CANDIDATES]:
        assert set(candidate.mesh.split(" ")) <= set(texts)
    for num_bytes in (best.plan.memory.weights_bytes, best.memory_parts["free"], best.memory_parts["reserve"]):
        assert format_bytes(num_bytes) in texts
    assert f"cache {format_bytes(best.plan.memory.cache_bytes)}, workspace" in " ".join(texts)  # no room in the bar
    assert {"attention/k, v", "mlp/experts/gate, up", "layer 0: 8.0 MiB = 4 x 2.0 MiB", "0-3", "over tensor:4"} <= {
        *texts
    }
    memory = planner.cluster.rates.bytes_per_s / 1e12
    assert f"expected: memory {memory:.2f} TB/s, arithmetic 494 TFLOP/s" in texts
    assert "data sheet: memory 3.35 TB/s, arithmetic 989 TFLOP/s" in texts
    steps = [text for text in texts if "FLOP/B" in text]
    assert [text.partition(":")[0] for text in steps] == ["decodes 1 row", "prefills 1024 tokens"]


@pytest.mark.parametrize("name", ["plan.svg", "plan.PNG"])
def test_the_same_plan_gives_the_same_file(tmp_path: pathlib.Path, planned: tuple[Planner, list[Candidate]], name: str):
    """Whatever the user likes pictures to look like."""
    path = tmp_path / name
    plots.plot_plan(path, *planned)
    first = path.read_bytes()
    with mpl.rc_context({"font.size": 30, "svg.hashsalt": None, "savefig.dpi": 20, "axes.facecolor": "red"}):
        plots.plot_plan(path, *planned)
    assert path.read_bytes() == first
    assert [*tmp_path.iterdir()] == [path]
    if name == "plan.PNG":
        assert first.startswith(b"\x89PNG\r\n\x1a\n") and struct.unpack(">I", first[16:20]) == (2100,)


def test_a_picture_that_fails_leaves_what_there_was(
    tmp_path: pathlib.Path, planned: tuple[Planner, list[Candidate]], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "plan.svg"
    path.write_text("old")

    def full(path: pathlib.Path, data: bytes) -> None:
        path.write_text(data[:100].decode())
        raise OSError("No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        plots.plot_plan(path, *planned)
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_only_svg_and_png_are_written(tmp_path: pathlib.Path, planned: tuple[Planner, list[Candidate]]):
    for name in ("plan.pdf", "plan"):
        with pytest.raises(ValueError, match=rf"--plot={tmp_path}/{name}: must end in \.svg or \.png"):
            plots.plot_plan(tmp_path / name, *planned)
    with pytest.raises(ValueError, match=f"there is no directory {tmp_path}/absent"):
        plots.check(tmp_path / "absent" / "plan.svg")
    assert not [*tmp_path.iterdir()]


def test_without_matplotlib_a_line_says_what_to_install(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError) as caught:
        plots.check(tmp_path / "plan.svg")
    assert str(caught.value) == f'--plot={tmp_path}/plan.svg: matplotlib is missing; pip install "jaxinfer[viz]"'


def test_nothing_else_imports_matplotlib():
    code = "import sys, jaxinfer.planning.candidates, jaxinfer.planning.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[1])


def colliding(planner: Planner, candidates: list[Candidate]) -> list[str]:
    """Texts that lie on others, or not on the page."""
    with matplotlib.style.context(["default", plots.STYLE]):
        figure = plots.figure(planner, candidates, "1\n2\n3\n4")
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]
        beyond_ends = {
            tick.label1
            for axis in (axis for area in figure.axes for axis in (area.xaxis, area.yaxis))
            for tick in axis.get_major_ticks()
            if not min(ends := axis.get_view_interval()) <= tick.get_loc() <= max(ends)
        }
        shown = [text for text in texts if text.get_visible() and text not in beyond_ends]
        boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    page = figure.bbox
    boxes = [(text, box) for text, box in boxes if box.width]
    found = [f"{a} | {b}" for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if box.overlaps(other)]
    return found + [text for text, box in boxes if box.x0 < 0 or box.x1 > page.x1 or box.y0 < 0 or box.y1 > page.y1]


@pytest.mark.parametrize("count", [1, 4, 12])
def test_no_label_lies_on_another(planned: tuple[Planner, list[Candidate]], count: int):
    """With the longest name that a mesh can have, and a plan whose parts are all too small for a label but one."""
    planner, (best, *_) = planned
    longest = dataclasses.replace(best, mesh=LONGEST_MESH)
    memory = dataclasses.replace(best.plan.memory, weights_bytes=GIB)
    small = dataclasses.replace(longest, plan=dataclasses.replace(best.plan, memory=memory))
    assert not colliding(planner, [*[best, *[longest] * 11][: count - 1], small])


def test_no_number_of_a_device_lies_on_another():
    """Of 16, in pieces side by side and one above the other."""
    planner = plans.planner("llama_3_1_70b_instruct", "h100:2x8", objective="latency")
    assert not colliding(planner, [plans.candidate(planner.candidate("tensor:16"))])


def test_a_label_without_room_is_left_out_or_cut_short():
    """64 devices, each with its pages of the cache in a thirtieth of an inch."""
    page = Figure(figsize=(4, 4))
    area = page.add_axes((0.2, 0.2, 0.5, 0.5))
    pieces = cut((ax.PAGES, ax.HEAD_DIM), (128, 64), Layout.create("data:64"))
    drawing.pieces(area, drawing.Array("attention/q " * 20, "", "cache", 2**20, pieces))
    texts = {text.get_text() for text in page.findobj(Text) if isinstance(text, Text)}
    assert "0" not in texts and "1.0 MiB = 64 x 16.0 KiB" in texts
    (title,) = (text for text in texts if text.startswith("attention"))
    assert title.endswith("...") and len(title) < 60


@pytest.mark.parametrize(
    ("devices", "text"), [((3,), "3"), ((0, 1, 2), "0-2"), ((0, 4), "0, 4"), ((0, 2, 4, 6), "0, 2, ... 6")]
)
def test_numbers_of_devices_are_short(devices: tuple[int, ...], text: str):
    assert drawing.device_text(devices) == text
