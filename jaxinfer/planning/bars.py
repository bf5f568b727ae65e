"""What a device's memory and a step's time go to, in plain characters for a terminal. Host only.

    Memory of a device, 79.11 GiB:
    # weights  = cache  + workspace  . free  / reserve

    data:2,tensor:4  # 32.86 GiB  = 33.40 GiB  + 1.34 GiB  . 43.9 MiB  / 11.47 GiB
    #################################==================================+.///////////

Whatever is not zero has a character at least.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxinfer.planner import MemoryPlan, format_bytes
from jaxinfer.planning.roofline import StepTime

_GAP = "  "
_MARKS = {
    "weights": "#",
    "cache": "=",
    "workspace": "+",
    "free": ".",
    "reserve": "/",
    "reading weights": "#",
    "arithmetic": "*",
    "attention": "=",
    "sampling": "+",
    "collectives": "%",
    "launches": ":",
    "pipeline fill": ".",
}


class _Entry(NamedTuple):
    head: str
    parts: Mapping[str, float]
    length: int  # of the bar


def memory_parts(memory: MemoryPlan, memory_fraction: float, device_bytes: int) -> dict[str, int]:
    """Bytes of a device that has so many in all, by what they are for.

    "free" may be used and is not; "reserve" is what `memory_fraction` leaves of the free memory, and what others had
    of the device before.
    """
    allowed = int((device_bytes if memory.free_bytes is None else memory.free_bytes) * memory_fraction)
    used = {"weights": memory.weights_bytes, "cache": memory.cache_bytes, "workspace": memory.workspace_bytes}
    return {**used, "free": allowed - sum(used.values()), "reserve": device_bytes - allowed}


def memory_bars(devices: Mapping[str, Mapping[str, int]], width: int = 80) -> str:
    """For each mesh a bar of `width` characters, from the `memory_parts` of a device, which have the same sum."""
    device_bytes = sum(next(iter(devices.values())).values())
    title = f"Memory of a device, {format_bytes(device_bytes)}:"
    return _chart(title, [_Entry(mesh, parts, width) for mesh, parts in devices.items()], format_bytes, width)


def step_bars(steps: Mapping[str, StepTime], width: int = 80) -> str:
    """For each mesh a bar of as many characters as the step's time is of the longest, which has `width`."""
    longest = max(step.total_s for step in steps.values())
    entries = [
        _Entry(f"{mesh}{_GAP}{format_ms(step.total_s)}:", step.parts, round(width * step.total_s / longest))
        for mesh, step in steps.items()
    ]
    return _chart("Time of a step that decodes:", entries, format_ms, width)


def bar(parts: Mapping[str, float], width: int) -> str:
    """`width` characters, in proportion; at least one for each part that is not zero."""
    return "".join(_MARKS[name] * count for name, count in zip(parts, columns([*parts.values()], width), strict=True))


def columns(sizes: Sequence[float], width: int) -> list[int]:
    """`width` in proportion to the sizes, but at least 1 for each that is not zero. [1, 98, 101], 20 -> [1, 9, 10]."""
    total, counts = sum(sizes) or 1, [int(size > 0) for size in sizes]
    for _ in range(width - sum(counts)):
        short = [size / total * width - count for size, count in zip(sizes, counts, strict=True)]
        counts[short.index(max(short))] += 1
    return counts


def format_ms(seconds: float) -> str:
    """To three digits, as "0.0123 ms", "20.7 ms" or "1230 ms"; what is less than a microsecond as "<0.001 ms"."""
    ms = 1e3 * seconds
    if ms < 0.001:
        return "<0.001 ms"
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:#.3g} ms"


def _chart(title: str, entries: Iterable[_Entry], text_of: Callable[[float], str], width: int) -> str:
    """What the marks mean, and then each bar below its name and its sizes."""
    entries = [*entries]
    names = [name for name in entries[0].parts if any(entry.parts[name] > 0 for entry in entries)]
    lines = [title, *_wrapped([f"{_MARKS[name]} {name}" for name in names], width)]
    labels = [[f"{_MARKS[name]} {text_of(size)}" for name, size in e.parts.items() if size > 0] for e in entries]
    together = [[entry.head, *words] for entry, words in zip(entries, labels, strict=True)]
    if all(len(_wrapped(words, width)) == 1 for words in together):
        heads = [_wrapped(words, width) for words in together]
    else:
        heads = [[entry.head, *_wrapped(words, width)] for entry, words in zip(entries, labels, strict=True)]
    for entry, head in zip(entries, heads, strict=True):
        lines += ["", *head, bar(entry.parts, entry.length)]
    return "\n".join(lines)


def _wrapped(words: Iterable[str], width: int) -> list[str]:
    """In lines of at most `width` characters, as far as each word has no more."""
    lines: list[str] = []
    for word in words:
        if lines and len(joined := f"{lines[-1]}{_GAP}{word}") <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines
