"""GPUs as their vendor describes them, and how they are linked. Host only.

Rates are the data sheets': dense, without sparsity, for products summed in float32. Latencies are no vendor's figure
but what collectives of small arrays were published to take; `--link_latency_s` replaces them.
"""

import dataclasses
from typing import Any

_KIB, _MIB = 2**10, 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """Between devices.

    Attributes:
      name: what it is called.
      bytes_per_s: of one device, in one direction.
      latency_s: of a collective of next to nothing.
    """

    name: str
    bytes_per_s: float
    latency_s: float


NVLINK_3 = Link(name="NVLink 3", bytes_per_s=300e9, latency_s=8e-6)
NVLINK_4 = Link(name="NVLink 4", bytes_per_s=450e9, latency_s=8e-6)
NVLINK_5 = Link(name="NVLink 5", bytes_per_s=900e9, latency_s=8e-6)
PCIE_4 = Link(name="PCIe 4.0 x16", bytes_per_s=25e9, latency_s=25e-6)  # of 32e9, through the host
INFINIBAND_200 = Link(name="200 Gb/s per GPU", bytes_per_s=25e9, latency_s=30e-6)
INFINIBAND_400 = Link(name="400 Gb/s per GPU", bytes_per_s=50e9, latency_s=30e-6)
ETHERNET_25 = Link(name="25 Gb/s per GPU", bytes_per_s=3.125e9, latency_s=50e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPU:
    """A kind of GPU.

    Attributes, where the name does not say it:
      device_kind: as JAX calls it.
      capability: compute capability.
      memory_bytes: that CUDA counts, less than what it is sold with; of most to 0.1 GiB, as programs that ran out of it
        say.
      bandwidth: of its memory, bytes per second.
      flops: dense products of 16-bit numbers, per second.
      flops_float32: outside of the matrix unit.
      link: to the others of its node.
      network: to other nodes.
      devices_per_node: as it is usually sold.
      num_cores: multiprocessors.
      shared_bytes: shared memory of a multiprocessor.
      block_shared_bytes: the most of them that a block of threads can have.
    """

    device_kind: str
    capability: tuple[int, int]
    memory_bytes: int
    bandwidth: float
    flops: float
    flops_float32: float
    link: Link
    network: Link
    devices_per_node: int = 8
    num_cores: int
    shared_bytes: int
    block_shared_bytes: int
    l2_bytes: int
    clock_ghz: float


def _gib(size: float) -> int:
    return int(size * 2**30)


_AMPERE_80: dict[str, Any] = {"capability": (8, 0), "shared_bytes": 164 * _KIB, "block_shared_bytes": 163 * _KIB}
_AMPERE_86: dict[str, Any] = {"capability": (8, 6), "shared_bytes": 100 * _KIB, "block_shared_bytes": 99 * _KIB}
_ADA: dict[str, Any] = {"capability": (8, 9), "shared_bytes": 100 * _KIB, "block_shared_bytes": 99 * _KIB}
_HOPPER: dict[str, Any] = {"capability": (9, 0), "shared_bytes": 228 * _KIB, "block_shared_bytes": 227 * _KIB}
_BLACKWELL: dict[str, Any] = {"capability": (10, 0), "shared_bytes": 228 * _KIB, "block_shared_bytes": 227 * _KIB}
_A100: dict[str, Any] = _AMPERE_80 | {
    "flops": 312e12,
    "flops_float32": 19.5e12,
    "link": NVLINK_3,
    "network": INFINIBAND_200,
    "num_cores": 108,
    "l2_bytes": 40 * _MIB,
    "clock_ghz": 1.41,
}
_H100: dict[str, Any] = _HOPPER | {
    "flops": 989e12,
    "flops_float32": 67e12,
    "link": NVLINK_4,
    "network": INFINIBAND_400,
    "num_cores": 132,
    "l2_bytes": 50 * _MIB,
    "clock_ghz": 1.98,
}
_CARD: dict[str, Any] = {"link": PCIE_4, "network": ETHERNET_25}

GPUS: dict[str, GPU] = {
    "a100-40g": GPU(device_kind="NVIDIA A100-SXM4-40GB", memory_bytes=_gib(39.45), bandwidth=1.555e12, **_A100),
    "a100-80g": GPU(device_kind="NVIDIA A100-SXM4-80GB", memory_bytes=_gib(79.15), bandwidth=2.039e12, **_A100),
    "a10-24g": GPU(
        device_kind="NVIDIA A10",
        memory_bytes=_gib(22.1),
        bandwidth=600e9,
        flops=125e12,
        flops_float32=31.2e12,
        devices_per_node=4,
        num_cores=72,
        l2_bytes=6 * _MIB,
        clock_ghz=1.70,
        **_AMPERE_86,
        **_CARD,
    ),
    "a6000-48g": GPU(
        device_kind="NVIDIA RTX A6000",
        memory_bytes=_gib(47.5),
        bandwidth=768e9,
        flops=154.8e12,
        flops_float32=38.7e12,
        devices_per_node=4,
        num_cores=84,
        l2_bytes=6 * _MIB,
        clock_ghz=1.80,
        **_AMPERE_86,
        **_CARD,
    ),
    "rtx3090-24g": GPU(
        device_kind="NVIDIA GeForce RTX 3090",
        memory_bytes=_gib(23.69),
        bandwidth=936e9,
        flops=71e12,
        flops_float32=35.6e12,
        devices_per_node=4,
        num_cores=82,
        l2_bytes=6 * _MIB,
        clock_ghz=1.70,
        **_AMPERE_86,
        **_CARD,
    ),
    "rtx4090-24g": GPU(
        device_kind="NVIDIA GeForce RTX 4090",
        memory_bytes=_gib(23.5),
        bandwidth=1.008e12,
        flops=165.2e12,
        flops_float32=82.6e12,
        devices_per_node=4,
        num_cores=128,
        l2_bytes=72 * _MIB,
        clock_ghz=2.52,
        **_ADA,
        **_CARD,
    ),
    "l4": GPU(
        device_kind="NVIDIA L4",
        memory_bytes=_gib(22.0),
        bandwidth=300e9,
        flops=121e12,
        flops_float32=30.3e12,
        devices_per_node=4,
        num_cores=58,
        l2_bytes=48 * _MIB,
        clock_ghz=2.04,
        **_ADA,
        **_CARD,
    ),
    "l40s": GPU(
        device_kind="NVIDIA L40S",
        memory_bytes=_gib(44.4),
        bandwidth=864e9,
        flops=362e12,
        flops_float32=91.6e12,
        num_cores=142,
        l2_bytes=96 * _MIB,
        clock_ghz=2.52,
        **_ADA,
        **_CARD,
    ),
    "h100": GPU(device_kind="NVIDIA H100 80GB HBM3", memory_bytes=84_942_979_072, bandwidth=3.352e12, **_H100),
    "h200": GPU(device_kind="NVIDIA H200", memory_bytes=150_754_820_096, bandwidth=4.8e12, **_H100),
    "b200": GPU(
        device_kind="NVIDIA B200",
        memory_bytes=_gib(178.35),
        bandwidth=7.7e12,
        flops=2250e12,
        flops_float32=80e12,
        link=NVLINK_5,
        network=INFINIBAND_400,
        num_cores=148,
        l2_bytes=126 * _MIB,
        clock_ghz=1.97,
        **_BLACKWELL,
    ),
}
