"""A plan as a picture: memory of a device, arithmetic against memory, and which device holds what. Needs matplotlib.

The same plan gives the same file. `drawing` has the three parts.
"""

import importlib.util
import io
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxinfer import kv_cache
from jaxinfer.planner import format_bytes
from jaxinfer.planning import drawing
from jaxinfer.planning.candidates import Candidate, Planner
from jaxinfer.planning.pieces import cut, cut_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
MOST_CANDIDATES = 12

_MARGIN, _LINE, _TITLE = 0.35, 0.16, 0.45  # inches, as all lengths here
_WIDTH = 14.0
_NAMES, _BARS, _REST = 2.1, 4.2, 2.0  # of the memory's part: names of meshes, bars, and what has no room in these
_BAR, _AXIS, _LEAST_TOP = 0.36, 0.45, 3.4
_NUM_COLUMNS, _NUM_ROWS = 5, 2  # of arrays
_ARRAY_HEIGHT, _ARRAY_TITLE, _ARRAY_GAP = 1.6, 0.35, 0.4
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "svg.fonttype": "none",  # text that can be searched
    "svg.hashsalt": "jaxinfer",  # else ids are random
}


def check(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path, if a picture could be written to it. Raises ValueError; RuntimeError without matplotlib."""
    path = pathlib.Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot={path}: must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot={path}: there is no directory {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(f'--plot={path}: matplotlib is missing; pip install "jaxinfer[viz]"')
    return path


def plot_plan(
    path: str | os.PathLike[str], planner: Planner, candidates: Sequence[Candidate], heading: str = ""
) -> None:
    """Writes SVG or PNG, as the path ends: whole, or not at all.

    Of at least one candidate, the best first, of which all but the first `MOST_CANDIDATES` are left out; `heading` is
    text above all. Raises as `check` does.
    """
    path = check(path)
    import matplotlib.style

    data = io.BytesIO()
    kind = path.suffix.lower().removeprefix(".")
    with matplotlib.style.context(["default", STYLE]):
        page = figure(planner, candidates[:MOST_CANDIDATES], heading)
        page.savefig(data, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data.getvalue())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def figure(planner: Planner, candidates: Sequence[Candidate], heading: str) -> "Figure":
    """What `plot_plan` writes. To be made and drawn in the style of `STYLE`."""
    from matplotlib.figure import Figure

    best = candidates[0]
    arrays = _arrays(planner, best)
    top = max(_LEAST_TOP, _BAR * len(candidates)) + _AXIS
    num_rows = -(-len(arrays) // _NUM_COLUMNS)
    array_row = _ARRAY_TITLE + _ARRAY_HEIGHT + _ARRAY_GAP
    beneath_heading = _MARGIN + _LINE * (heading.count("\n") + 2)
    height = beneath_heading + 2 * _TITLE + top + num_rows * array_row + _MARGIN
    page = Figure(figsize=(_WIDTH, height))

    def area(left: float, above: float, width: float, tall: float):
        """In inches from the left and from the top."""
        return page.add_axes((left / _WIDTH, 1 - (above + tall) / height, width / _WIDTH, tall / height))

    def text(left: float, above: float, words: str, **style: Any) -> None:
        page.text(left / _WIDTH, 1 - above / height, words, va="top", linespacing=1.4, parse_math=False, **style)

    text(_MARGIN, _MARGIN, heading)
    above = beneath_heading
    of_device = f"{planner.cluster.device_kind}, {format_bytes(planner.cluster.memory_bytes)}"
    text(_MARGIN, above, f"Memory of a device: {of_device}", weight="bold")
    right = _MARGIN + _NAMES + _BARS + _REST + 1.0
    text(right, above, f"A device's step on {best.mesh}", weight="bold")
    above += _TITLE
    drawing.memory(area(_MARGIN + _NAMES, above, _BARS, _BAR * len(candidates)), candidates)
    drawing.roofline(area(right, above, _WIDTH - _MARGIN - right, _LEAST_TOP - 0.9), planner, best)
    above += top
    text(_MARGIN, above, _arrays_title(best), weight="bold")
    above += _TITLE - 0.1
    pitch = (_WIDTH - 2 * _MARGIN) / _NUM_COLUMNS
    for i, array in enumerate(arrays):
        row, column = divmod(i, _NUM_COLUMNS)
        left = _MARGIN + column * pitch + 0.35
        drawing.pieces(area(left, above + row * array_row + _ARRAY_TITLE, pitch - 0.5, _ARRAY_HEIGHT), array)
    return page


def _arrays_title(candidate: Candidate) -> str:
    """Of what is drawn of weights and cache."""
    title = f"Which of the {candidate.num_devices} devices of {candidate.mesh} hold which part"
    return title if candidate.num_devices > 1 else "What the device holds"


def _arrays(planner: Planner, candidate: Candidate) -> list[drawing.Array]:
    """Weights of each kind, and the cache."""
    splits, memory = candidate.model.splits, candidate.plan.memory
    found = []
    for kind in cut_weights(planner.weights, splits, most=_NUM_COLUMNS * _NUM_ROWS - 1):
        where = "" if kind.layer is None else f"layer {kind.layer}: "
        found.append(drawing.Array(_joined(kind.names), where, "weights", kind.weight.num_bytes, kind.pieces))
    spec = kv_cache.cache_spec(
        planner.model,
        splits,
        pages_per_shard=memory.pages_per_shard,
        page_size=candidate.plan.page_size,
        dtype=planner.dtype,
    )
    pieces = cut(spec.axes, spec.shape, splits)
    title = f"cache, {candidate.plan.page_size} tokens a page"
    num_bytes = memory.cache_bytes * pieces.num_pieces
    return [*found, drawing.Array(title, "", "cache", num_bytes, pieces)]


def _joined(paths: Sequence[str]) -> str:
    """As "attention/k, v" of attention/k/weight and attention/v/weight."""
    first, *others = (path.removesuffix("/weight").removesuffix("/table") for path in paths)
    folder = first[: first.rfind("/") + 1]
    return ", ".join([first, *(name.removeprefix(folder) for name in others)])
