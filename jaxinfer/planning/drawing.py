"""The parts of a plan's picture, each into an area of a figure. Needs matplotlib, of which `plots` made the areas.

Colours are those of what memory is for: blue for weights, and for what waits for them, green for the cache. Pieces of
an array are of its colour, the darker the higher the number of their first device.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxinfer.planner import GIB, format_bytes
from jaxinfer.planning.candidates import Candidate, Planner
from jaxinfer.planning.hardware import GPUS
from jaxinfer.planning.pieces import Pieces
from sharding_rules import axes as ax

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "weights": "#4a76a8",
    "cache": "#5a9e7c",
    "workspace": "#d8a24a",
    "free": "#ececec",
    "reserve": "#c9c9c9",
    "arithmetic": "#b65b4c",
}
_INK, _FAINT = "#262626", "#707070"
_LEAST_SIZE = 4.5  # points, of a label; where there is no room for it, there is none
_POINTS = 72  # of an inch


class Array(NamedTuple):
    """To be drawn.

    Attributes:
      where: of it there are more, such as "layer 0: "; "" if not.
      color: of `COLORS`.
      num_bytes: of all pieces, each once.
    """

    title: str
    where: str
    color: str
    num_bytes: float
    pieces: Pieces


def memory(area: "Axes", candidates: Sequence[Candidate]) -> None:
    """A stacked bar for each candidate; beside it the sizes for which it has no room."""
    device_gib = sum(candidates[0].memory_parts.values()) / GIB
    for place, candidate in enumerate(candidates):
        left, unlabelled = 0.0, []
        for name, num_bytes in candidate.memory_parts.items():
            gib, label = num_bytes / GIB, format_bytes(num_bytes)
            area.barh(place, gib, left=left, height=0.72, color=COLORS[name], label=name if place == 0 else None)
            if _size_that_fits(label, gib / device_gib * _width(area), 1, 7) == 7:
                color = "white" if name in ("weights", "cache") else _INK
                area.text(left + gib / 2, place, label, ha="center", va="center", size=7, color=color)
            elif num_bytes:
                unlabelled.append(f"{name} {label}")
            left += gib
        lines = [", ".join(unlabelled[i : i + 2]) for i in range(0, len(unlabelled), 2)]
        area.text(1.02 * device_gib, place, "\n".join(lines), va="center", size=6.5, color=_FAINT)
    area.set(xlim=(0, device_gib), ylim=(len(candidates) - 0.5, -0.5), xlabel="GiB")
    area.set_yticks(range(len(candidates)), [c.mesh.replace(" (", "\n(") for c in candidates], size=7)
    area.spines["left"].set_visible(False)
    area.tick_params(axis="y", length=0)
    area.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, borderpad=0, handlelength=1, fontsize=7
    )


def roofline(area: "Axes", planner: Planner, candidate: Candidate) -> None:
    """Steps of one device under what its memory and its arithmetic allow, with the legend beneath."""
    cluster, model = planner.cluster, candidate.model
    rows = candidate.performance.num_seqs // model.splits.num_shards(ax.BATCH)
    chunk = candidate.performance.prefill_load
    steps = {
        _rows("decodes", 1): (planner.workload.decode_load(1), candidate.config.decode_steps),
        _rows("decodes", rows): (planner.workload.decode_load(rows), candidate.config.decode_steps),
        _rows(f"prefills {chunk.chunk_tokens} tokens", chunk.rows, "beside "): (chunk, 1),
    }
    bandwidth, peak = cluster.rates.bytes_per_s, max(rate for _, rate in cluster.rates.flops)
    points = {}
    for name, (load, num_steps) in steps.items():
        flops, num_bytes = model.work(load)
        points[name] = flops / num_bytes, flops / model.step_time(load, num_steps).total_s
    intensities = [peak / bandwidth, *(x for x, _ in points.values())]
    ends = min(intensities) / 4, max(intensities) * 4
    _roof(area, ends, bandwidth, peak, "expected", "-")
    if (gpu := GPUS.get(cluster.name)) is not None:
        _roof(area, ends, gpu.bandwidth, gpu.flops, "data sheet", ":")
    for marker, (name, (x, y)) in zip("o^s", points.items(), strict=False):
        color = COLORS["weights" if x < peak / bandwidth else "arithmetic"]
        intensity = f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        text = f"{name}: {intensity} FLOP/B, {_si(y)}FLOP/s"
        area.plot(x, y, marker, color=color, markeredgecolor="white", markersize=8, label=text, zorder=3)
    low = min(y for _, y in points.values())
    area.set(xscale="log", yscale="log", xlim=ends, ylim=(low / 4, None))
    area.set(xlabel="FLOP for a byte of weights and cache", ylabel="FLOP/s of a device")
    area.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    area.yaxis.set_major_formatter(lambda y, _: _si(y))
    area.grid(color=COLORS["free"])
    area.legend(loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False, borderpad=0, fontsize=7)


def _roof(area: "Axes", ends: tuple[float, float], bandwidth: float, peak: float, name: str, line: str) -> None:
    ridge = peak / bandwidth
    low, high = ends
    style: dict[str, Any] = {"linestyle": line, "linewidth": 1.6}
    text = f"{name}: memory {_si(bandwidth)}B/s, arithmetic {_si(peak)}FLOP/s"
    area.plot([low, ridge], [low * bandwidth, peak], color=COLORS["weights"], label=text, **style)
    area.plot([ridge, max(ridge, high)], [peak, peak], color=COLORS["arithmetic"], **style)


def pieces(area: "Axes", array: Array) -> None:
    """Its pieces, with the numbers of the devices that hold them, as far as there is room."""
    from matplotlib.patches import Rectangle

    cut = array.pieces
    rows, columns = cut.rows, cut.columns
    cell = _width(area) / columns.num_pieces, _height(area) / rows.num_pieces
    texts = {at: device_text(devices) for at, devices in cut.devices.items()}
    size = _size_that_fits(max(texts.values(), key=len), *cell)
    line = min(0.8, 0.15 * _POINTS * min(cell))
    for rank, (row, column) in enumerate(sorted(cut.devices, key=cut.devices.__getitem__)):
        face = _tint(COLORS[array.color], rank / len(cut.devices))
        area.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white", linewidth=line))
        if size >= _LEAST_SIZE:
            middle = column + 0.5, row + 0.5
            area.text(*middle, texts[row, column], ha="center", va="center", size=size, color=_INK)
    area.set(xlim=(0, columns.num_pieces), ylim=(rows.num_pieces, 0), xticks=[], yticks=[])
    across = f"{columns.label} {columns.over}".rstrip()
    down = f"{rows.label}\n{rows.over}".rstrip()
    area.set_xlabel(across, size=_size_that_fits(across, _width(area) + 0.4, 1, 7), labelpad=3)
    area.set_ylabel(down, size=_size_that_fits(rows.over or down, _height(area) + 0.2, 1, 7), labelpad=3)
    for spine in area.spines.values():
        spine.set_visible(False)
    text = f"{array.where}{format_bytes(array.num_bytes)}"
    if cut.num_pieces > 1:
        text += f" = {cut.num_pieces} x {format_bytes(array.num_bytes / cut.num_pieces)}"
    if cut.num_copies > 1:
        text += f", {cut.num_copies} copies"
    room = _width(area) + 0.35
    size = _size_that_fits(text, room, 1, 7)
    area.annotate(text, (0, 1), (0, 4), "axes fraction", "offset points", size=size, color=_FAINT)
    title = _shortened(array.title, 7.5, room)
    area.annotate(title, (0, 1), (0, 15), "axes fraction", "offset points", size=7.5)


def device_text(devices: Sequence[int]) -> str:
    """The numbers, which ascend, of at most three: "0-7", "0, 4", "0, 2, 4", "0, 2, ... 14"."""
    first, last = devices[0], devices[-1]
    if len(devices) > 1 and last - first == len(devices) - 1:
        return f"{first}-{last}"
    return ", ".join(map(str, devices)) if len(devices) < 4 else f"{first}, {devices[1]}, ... {last}"


def _rows(does: str, count: int, link: str = "") -> str:
    """As "decodes 1 row"."""
    return f"{does} {link}{count} row{'' if count == 1 else 's'}" if count else does


def _size_that_fits(text: str, width: float, height: float, most: float = 8) -> float:
    """Points, at most so many, of a text in so many inches."""
    return min(most, 0.75 * height * _POINTS, 0.9 * width / _text_width(text, 1))


def _text_width(text: str, size: float) -> float:
    """Inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0] / _POINTS


def _shortened(text: str, size: float, width: float) -> str:
    while _text_width(text, size) > width:
        text = text.removesuffix("...")[:-1] + "..."
    return text


def _width(area: "Axes") -> float:
    """Inches."""
    return area.get_position().width * area.figure.get_figwidth()  # pyright: ignore


def _height(area: "Axes") -> float:
    return area.get_position().height * area.figure.get_figheight()  # pyright: ignore


def _tint(color: str, share: float) -> tuple[float, ...]:
    """From a light one, at 0, to a fuller one, on which ink can still be read."""
    from matplotlib.colors import to_rgb

    strength = 0.25 + 0.5 * share
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(color))


def _si(value: float) -> str:
    """To three digits, as "495 T" for 4.95e14."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
