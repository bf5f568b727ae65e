"""Collectives and matrix products in the text of a program as XLA compiled it. Host only.

XLA gives no other access to them. What is read was looked at in programs for CPUs and for NVIDIA GPUs, of jax 0.10.2
and 0.12: results and devices are written in several ways, and what is not known raises ValueError.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_OPS = "all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast"
_INSTRUCTION = re.compile(rf"^ +(?:ROOT )?(%\S+) = (.*?) ({_OPS})(-start|-done)?\((.*)")
_RESULT = re.compile(r"^ +(?:ROOT )?(%\S+) = \(?\w+\[([\d,]*)\]")
_PRODUCT = re.compile(r" (?:dot|custom-call)\((%[\w.-]+)")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')  # of a dot, and of a call of cuBLAS
_SCOPE = re.compile(r'op_name="([^"]*)"')
_COMPUTATION = re.compile(r"^(ENTRY )?(%\S+) .*\{$")
_CALLED = re.compile(r"(\w+)=\{?((?:%[\w.-]+(?:, )?)+)")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [2,4]T(1,0): 0 to 7 as a matrix of 2 by 4, transposed
_DEVICES = re.compile(r"(replica_groups|source_target_pairs)=(mesh\[.*?\].*?\{.*?\}|\{.*?\}(?=, \w+=|$)|\S+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that travels between devices.

    Attributes:
      op: as XLA calls it: "all-reduce".
      dtype: likewise: "bf16".
      num_elements: of the result on one device.
      devices: one of the groups that exchange, or the devices that a value is passed on along: their places in the
        flattened mesh. Empty: all.
      scope: of the code that it comes from, which JAX names: "jit(decode)/while/body/layer_0/mlp/dot_general".
      is_in_loop: whether it happens in each turn of some loop.
      is_in_branch: whether it happens only where a condition says so.
    """

    op: str
    dtype: str
    num_elements: int
    devices: tuple[int, ...]
    scope: str
    is_in_loop: bool
    is_in_branch: bool

    @property
    def num_bytes(self) -> int:
        """Of the result on one device."""
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])  # f8e4m3fn: 8
        return -(-self.num_elements * bits // 8)


@dataclasses.dataclass(frozen=True)
class Product:
    """Two matrices that are multiplied on each device, or batches of them.

    Attributes:
      flops: two for each multiplication and addition.
      scope: as of a `Collective`.
    """

    flops: int
    scope: str


def products(hlo: str) -> list[Product]:
    """Of a module's text for GPUs, each once, in a loop too. A CPU's has some that look like anything else."""
    lines, _ = _read(hlo)
    sizes = {
        (computation, match[1]): [int(n) for n in match[2].split(",") if n]
        for computation, line in lines
        if (match := _RESULT.match(line))
    }
    found = []
    for computation, line in lines:
        result, call, contracted = _RESULT.match(line), _PRODUCT.search(line), _CONTRACTED.search(line)
        if result and call and contracted:
            of_left = sizes[computation, call[1]]
            summed = math.prod(of_left[int(n)] for n in re.findall(r"\d+", contracted[1]))
            scope = _SCOPE.search(line)
            found.append(Product(2 * math.prod(sizes[computation, result[1]]) * summed, scope[1] if scope else ""))
    return found


def collectives(hlo: str) -> list[Collective]:
    """Of a module's text. Of several that XLA made one operation, each.

    An operation that is started, and done later, is one. So is an all-to-all whose result is in pieces, one from each
    device.
    """
    return list(_collectives(hlo))


def _collectives(hlo: str) -> Iterator[Collective]:
    lines, places = _read(hlo)
    instructions = [(computation, m) for computation, line in lines if (m := _INSTRUCTION.match(line))]
    done = {re.findall(r"%[\w.-]+", m[5])[0]: m[2] for _, m in instructions if m[4] == "-done"}
    for computation, match in instructions:
        name, result, op, phase, rest = match.groups()
        if phase == "-done":
            continue
        scope = _SCOPE.search(rest)
        is_in_loop, is_in_branch = places.get(computation, (False, False))
        for dtype, num_elements in _arrays(op, done.get(name, result)):
            devices = _devices(rest)
            yield Collective(op, dtype, num_elements, devices, scope[1] if scope else "", is_in_loop, is_in_branch)


def _read(hlo: str) -> tuple[list[tuple[str, str]], dict[str, tuple[bool, bool]]]:
    """Lines with their computation, and of these whether they are in a loop, and whether in a branch."""
    lines, calls = [], collections.defaultdict(list)
    computation = entry = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[2]
            entry = computation if header[1] else entry
        lines.append((computation, line))
        calls[computation] += _CALLED.findall(line)
    return lines, _places(entry, calls)


def _places(entry: str, calls: dict[str, list[tuple[str, str]]]) -> dict[str, tuple[bool, bool]]:
    places, queue = {entry: (False, False)}, [entry]
    while queue:
        caller = queue.pop()
        in_loop, in_branch = places[caller]
        for role, names in calls.get(caller, ()):
            for name in names.split(", "):
                before = places.get(name, (False, False))
                place = (in_loop or role == "body" or before[0], in_branch or role in _BRANCHES or before[1])
                if name not in places or place != before:
                    places[name] = place
                    queue.append(name)
    return places


def _arrays(op: str, result: str) -> list[tuple[str, int]]:
    """(dtype, elements) of each.

    >>> _arrays("all-reduce", "(f32[4,1,64]{2,1,0}, bf16[4])")
    [('f32', 256), ('bf16', 4)]
    """
    arrays = [(dtype, math.prod(int(n) for n in sizes.split(",") if n)) for dtype, sizes in _ARRAY.findall(result)]
    if "all-to-all" in op and len({dtype for dtype, _ in arrays}) == 1:
        return [(arrays[0][0], sum(num for _, num in arrays))]
    return arrays


def _devices(attributes: str) -> tuple[int, ...]:
    """Those of the first group.

    >>> _devices("channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true")
    (0, 2)
    """
    match = _DEVICES.search(attributes)
    text = match[2].rstrip(",") if match else ""
    if match and match[1] == "source_target_pairs":
        return _ring({int(source): int(target) for source, target in re.findall(r"\{(\d+),(\d+)\}", text)})
    if text.startswith("mesh"):
        return _mesh_devices(text)
    if iota := re.fullmatch(rf"\[\d+,(\d+)\]<={_IOTA}", text):
        return tuple(_iota(iota[2], iota[3])[: int(iota[1])].tolist())
    if groups := re.fullmatch(r"\{(?:\{([\d,]+)\}.*)?\}", text):
        return tuple(map(int, groups[1].split(","))) if groups[1] else ()
    raise ValueError(f"XLA wrote the devices of a collective in a way that is not known here: {attributes[:300]!r}")


def _ring(follows: dict[int, int]) -> tuple[int, ...]:
    """From its lowest device on."""
    ring = [min(follows)]
    while (following := follows.get(ring[-1], ring[0])) not in ring:
        ring.append(following)
    return tuple(ring)


def _mesh_devices(text: str) -> tuple[int, ...]:
    """Of "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": those that differ in b."""
    match = re.fullmatch(rf"mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{((?:'\w+',?)*)\}}", text)
    if match is None:
        raise ValueError(f"XLA wrote the devices of a collective in a way that is not known here: {text!r}")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    ids = _iota(match[2], match[3]) if match[2] else np.arange(math.prod(sizes.values()))
    along = tuple(slice(None) if f"'{name}'" in match[4] else 0 for name in sizes)
    return tuple(ids.reshape([*sizes.values()])[along].ravel().tolist())


def _iota(sizes: str, order: str | None) -> np.ndarray:
    shape = [int(n) for n in sizes.split(",")]
    grid = np.arange(math.prod(shape)).reshape(shape)
    return (grid.transpose([int(n) for n in order.split(",")]) if order else grid).ravel()
