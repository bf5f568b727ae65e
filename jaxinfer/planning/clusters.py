"""The devices that a plan is for, and the links that a mesh lays its axes over. Host only."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from jaxinfer.planning.hardware import GPUS, Link
from jaxinfer.unknown_names import suggestion
from sharding_rules import axes as ax

CPU = "cpu"
_MOST_DEVICES = 4096
# Of a logit: 8 passes over 4 bytes to scale it and to add noise, and 6 in each of the two turns that a batch needs
# until all of its draws are within top-p.
_SAMPLING_BYTES = 4 * (8 + 2 * 6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What a step gets of a device, as far as is known.

    Attributes:
      bytes_per_s: of memory that is read in long pieces, such as weights.
      flops: of matrix products, per second, by the number of tokens that are multiplied at once: pairs of tokens and
        rate, ascending. In between a rate is what lies between, and beyond the ends that of the end.
      attention_bytes_per_s: of cached keys and values, read page by page.
      attention_flops: of attention's products, per second.
      logits_per_s: that sampling draws from, within top-p.
      layer_s: what a layer takes beside that: starting kernels, and what is too small to count.
      token_s: what each token takes of a layer beside that: norms, activations, rotations.
      step_s: what a step takes beside its layers.
    """

    bytes_per_s: float
    flops: tuple[tuple[int, float], ...]
    attention_bytes_per_s: float
    attention_flops: float
    logits_per_s: float
    layer_s: float
    token_s: float
    step_s: float

    def flops_at(self, num_tokens: float) -> float:
        """Of products of so many tokens, between the measured sizes in proportion of their logarithms."""
        low = high = self.flops[0]
        for point in self.flops:
            low, high = high, point
            if point[0] >= num_tokens:
                break
        if high[0] <= num_tokens or low[0] >= high[0]:
            return high[1]
        share = math.log(max(num_tokens, low[0]) / low[0]) / math.log(high[0] / low[0])
        return low[1] ** (1 - share) * high[1] ** share

    def shared(self, count: int) -> "Rates":
        """Of each of so many devices that have the same cores and memory, when all are busy."""
        return Rates(
            bytes_per_s=self.bytes_per_s / count,
            flops=tuple((num_tokens, rate / count) for num_tokens, rate in self.flops),
            attention_bytes_per_s=self.attention_bytes_per_s / count,
            attention_flops=self.attention_flops / count,
            logits_per_s=self.logits_per_s / count,
            layer_s=self.layer_s * count,
            token_s=self.token_s * count,
            step_s=self.step_s * count,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Of a GPU's data sheet, what a step is expected to get. Assumed, not measured: no GPU was at hand.

    `bandwidth`, `layer_s` and `step_s` put what others published of decoding in the middle of what we compute for it:
    gpt-fast on A100, vLLM on H100 and H200, each within a quarter (tests/test_planning_anchors.py). So a layer is about
    eight kernels that start in 5 us. `attention_bandwidth` is what a token of context costs vLLM on an H100. `flops` is
    what engines were published to get of the products' peak when they prefill.
    """

    bandwidth: float = 0.75
    flops: float = 0.5
    attention_bandwidth: float = 0.9
    attention_flops: float = 0.4
    link: float = 0.8
    layer_s: float = 40e-6
    step_s: float = 200e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal devices on equal nodes.

    Attributes:
      name: as `--devices` spells its devices, such as "h100".
      device_kind: as JAX calls them.
      platform: likewise, "gpu" or "cpu".
      memory_bytes: of a device.
      rates: of a device.
      link: between the devices of a node.
      network: between nodes.
    """

    name: str
    device_kind: str
    platform: str
    memory_bytes: int
    rates: Rates
    num_nodes: int
    devices_per_node: int
    link: Link
    network: Link

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    @property
    def most_per_node(self) -> int:
        """As these devices are usually sold."""
        return GPUS[self.name].devices_per_node if self.name in GPUS else self.devices_per_node

    @property
    def compute_capability(self) -> str | None:
        """Of a GPU, as JAX has it: "9.0"."""
        return ".".join(map(str, GPUS[self.name].capability)) if self.name in GPUS else None

    def __str__(self) -> str:
        inside = f" of {self.devices_per_node} over {self.link.name}" if self.devices_per_node > 1 else ""
        across = f", nodes over {self.network.name}" if self.num_nodes > 1 else ""
        nodes = f"{self.num_nodes} node{'s' if self.num_nodes > 1 else ''}"
        return f"{self.num_devices} x {self.device_kind}, {nodes}{inside}{across}"

    def in_float32(self) -> "Cluster":
        """GPUs whose products are those of full float32, outside of the matrix unit. As it is without GPUs."""
        if self.name not in GPUS:
            return self
        gpu, rates = GPUS[self.name], self.rates
        share = gpu.flops_float32 / gpu.flops
        flops = tuple((num_tokens, share * rate) for num_tokens, rate in rates.flops)
        rates = dataclasses.replace(rates, flops=flops, attention_flops=share * rates.attention_flops)
        return dataclasses.replace(self, rates=rates)

    def link_of(self, mesh_axes: Iterable[str], mesh: Mapping[str, int]) -> Link:
        """The slowest over which devices along these axes of a mesh meet. The last axis joins neighbours."""
        order = [axis for axis in ax.MESH_AXES if axis in mesh]
        widest = min((order.index(axis) for axis in mesh_axes if mesh.get(axis, 1) > 1), default=len(order))
        span = math.prod(mesh[axis] for axis in order[widest:])
        is_inside = math.prod(mesh.values()) <= self.devices_per_node or self.devices_per_node % span == 0
        return self.link if is_inside else self.network


def parse_devices(text: str, *, devices_per_node: int | None = None) -> tuple[str, int, int]:
    """The GPU's name, nodes, and devices of each: from "h100:8", "h200:2x8" or "l40s".

    `devices_per_node` is what a node has of more devices than it usually has. Raises ValueError for what there is not.
    """
    match = re.fullmatch(r"([a-z0-9-]+?)(?::(?:(\d+)x)?(\d+))?", text.strip().lower())
    if match is None:
        raise ValueError(f"--devices={text}: must be a device and how many, as h100:8, or nodes of them, as h100:2x8")
    name, nodes, count = match[1], match[2], int(match[3] or 1)
    if name != CPU and name not in GPUS:
        raise ValueError(f"--devices={text}: unknown device {name!r}; {suggestion(name, (CPU, *GPUS))}")
    if count < 1 or nodes == "0" or int(nodes or 1) * count > _MOST_DEVICES:
        raise ValueError(f"--devices={text}: must be 1 to {_MOST_DEVICES} devices")
    if nodes is not None:
        if devices_per_node not in (None, count):
            raise ValueError(f"--devices={text} has {count} on a node and --num_gpus_per_node={devices_per_node}")
        return name, int(nodes), count
    if devices_per_node is not None and devices_per_node < 1:
        raise ValueError(f"--num_gpus_per_node={devices_per_node}: must be at least 1")
    most = devices_per_node or (GPUS[name].devices_per_node if name in GPUS else count)
    if count <= most:
        return name, 1, count
    if count % most:
        raise ValueError(
            f"--devices={text}: {count} devices are no nodes of {most}; give --num_gpus_per_node, or {name}:NxM"
        )
    return name, count // most, most


def gpu_cluster(name: str, num_nodes: int, devices_per_node: int, efficiency: Efficiency) -> Cluster:
    """Of GPUs as `hardware` describes them, for products of 16-bit numbers."""
    gpu = GPUS[name]
    rates = Rates(
        bytes_per_s=efficiency.bandwidth * gpu.bandwidth,
        flops=((1, efficiency.flops * gpu.flops),),
        attention_bytes_per_s=efficiency.attention_bandwidth * gpu.bandwidth,
        attention_flops=efficiency.attention_flops * gpu.flops,
        logits_per_s=efficiency.bandwidth * gpu.bandwidth / _SAMPLING_BYTES,
        layer_s=efficiency.layer_s,
        token_s=0.0,
        step_s=efficiency.step_s,
    )
    link, network = (
        dataclasses.replace(link, bytes_per_s=efficiency.link * link.bytes_per_s) for link in (gpu.link, gpu.network)
    )
    return Cluster(
        name=name,
        device_kind=gpu.device_kind,
        platform="gpu",
        memory_bytes=gpu.memory_bytes,
        rates=rates,
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        link=link,
        network=network,
    )
