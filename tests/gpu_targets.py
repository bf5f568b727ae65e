"""Compiles for NVIDIA GPUs where there is none: JAX's CUDA plugin needs a description of the GPU, and no driver.

The plugin is `jax-cuda12-plugin`, or 13, with its `jax-cuda12-pjrt`, of JAX's version, and the compiler's last stage is
in `nvidia-cuda-nvcc-cu12`: `pip install --no-deps` of the three is enough.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class GPU:
    """What its vendor says of it.

    Attributes:
      name: by which JAX knows it, or one with the same capability: from 0.11 on it knows few that are not there.
      capability: compute capability.
      shared_bytes: of a multiprocessor.
      block_shared_bytes: the most of them that a block of threads can have.
    """

    name: str
    capability: tuple[int, int]
    num_cores: int
    shared_bytes: int
    block_shared_bytes: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: int
    clock_ghz: float

    def text(self) -> str:
        """The description that XLA reads, a text protocol buffer."""
        major, minor = self.capability
        of_family = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_bytes}
              shared_memory_per_block_optin: {self.block_shared_bytes}
              threads_per_core_limit: {2048 if minor == 0 else 1536}
              core_count: {self.num_cores}
              fpus_per_core: {64 if self.capability == (8, 0) else 128}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2_bytes}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: {major} minor: {minor}{of_family} }}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 9 }}
            device_description_str: "{self.name}"
        """


_KIB, _MIB, _GIB = 2**10, 2**20, 2**30
GPUS = {
    "a100": GPU(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 164 * _KIB, 163 * _KIB, 40 * _MIB, 80 * _GIB, 2_039_000_000_000, 1.41
    ),
    "a6000": GPU("NVIDIA A10", (8, 6), 84, 100 * _KIB, 99 * _KIB, 6 * _MIB, 48 * _GIB, 768_000_000_000, 1.80),
    "l40s": GPU("NVIDIA L40", (8, 9), 142, 100 * _KIB, 99 * _KIB, 96 * _MIB, 48 * _GIB, 864_000_000_000, 2.52),
    "h100": GPU(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 228 * _KIB, 227 * _KIB, 50 * _MIB, 80 * _GIB, 3_352_000_000_000, 1.98
    ),
    "b200": GPU("NVIDIA B200", (10, 0), 148, 228 * _KIB, 227 * _KIB, 126 * _MIB, 180 * _GIB, 8_000_000_000_000, 1.97),
}


def missing() -> str | None:
    """What is not installed of what this needs, or None."""
    for version in ("12", "13"):
        if importlib.util.find_spec(f"jax_cuda{version}_plugin"):
            return None
    return "jax-cuda12-plugin (or 13) is not installed"


@functools.cache
def devices(gpu: str, count: int = 1) -> list[jax.Device]:
    """Of one machine."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=GPUS[gpu].text(), topology=f"1x1x{count}")
    return list(topology.devices)


def compile_for(gpu: str, function: Any, *shapes: Any, **options: str) -> jax.stages.Compiled:
    """`function` of arrays of these shapes, trees of `jax.ShapeDtypeStruct`, for one."""
    mesh = Mesh(np.array(devices(gpu)), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    return compile_on(mesh, lambda: jax.jit(function).lower(*arguments), **options)


def compile_on(mesh: Mesh, lower: Callable[[], jax.stages.Lowered], **options: str) -> jax.stages.Compiled:
    """What is lowered for a mesh of `devices`, as well as it is on a machine that has them."""
    with _without_cache(), jax.set_mesh(mesh):  # Pallas asks the mesh which GPU it is
        # There is no device on which candidates could be timed. The tests' own level of optimization is for CPUs.
        ours: dict[str, str | bool] = {"xla_gpu_autotune_level": "0", "xla_backend_optimization_level": "3"}
        return lower().compile(ours | options)


class Resources(NamedTuple):
    """What a kernel takes of a GPU, as NVIDIA's assembler says."""

    registers: int  # of a thread; there are 255
    spilled_bytes: int  # stores of what did not fit into them


def resources(gpu: str, directory: pathlib.Path) -> dict[str, Resources]:
    """Of each kernel whose code XLA left there, as `xla_dump_to` asks it to."""
    major, minor = GPUS[gpu].capability
    architecture = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    found = {}
    for path in directory.glob("*.ptx"):
        if ".entry" not in path.read_text("utf-8"):
            continue
        command = [_assembler(), "-v", f"-arch={architecture}", path, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for name, spilled, registers in re.findall(_RESOURCES, text, re.DOTALL):
            found[name] = Resources(int(registers), int(spilled))
    return found


_RESOURCES = r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"


def _assembler() -> pathlib.Path:
    spec = importlib.util.find_spec("nvidia")
    assert spec is not None and spec.submodule_search_locations is not None
    folders = map(pathlib.Path, spec.submodule_search_locations)
    return next(path for folder in folders for path in folder.glob("**/bin/ptxas"))


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """What is compiled without a GPU JAX writes to its cache on disk, and cannot read again."""
    name = "jax_enable_compilation_cache"
    was_enabled = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # or what it found before is still believed
    try:
        yield
    finally:
        jax.config.update(name, was_enabled)
        compilation_cache.reset_cache()
