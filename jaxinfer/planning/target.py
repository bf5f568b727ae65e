"""GPUs that are not there, for XLA to compile for: JAX's CUDA plugin needs a description of the GPU, and no driver.

The plugin is `jax-cuda12-plugin`, or 13, with its `jax-cuda12-pjrt`, of JAX's version, and the compiler's last stage is
in `nvidia-cuda-nvcc-cu12`: `pip install --no-deps` of the three is enough, for a process that has JAX_PLATFORMS=cpu.
"""

import contextlib
import functools
import importlib.util
import itertools
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxinfer.compilation_cache import without_cache
from jaxinfer.planning.hardware import GPU

# Since jax 0.11 Pallas' Triton lowering looks a GPU up by its name, and knows few of those that are not there: by which
# it lowers for one that it does not know, of the same compute capability.
KNOWN_AS = {
    "NVIDIA RTX A6000": "NVIDIA A10",
    "NVIDIA GeForce RTX 3090": "NVIDIA A10",
    "NVIDIA L40S": "NVIDIA L40",
}


def missing() -> str | None:
    """What is not installed of what this needs, or None."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in ("12", "13")):
        return "jax-cuda12-plugin (or 13) is not installed; it is in jaxinfer[cuda12]"
    if assembler() is None:
        return "ptxas is not installed; it is in nvidia-cuda-nvcc-cu12, or in a CUDA toolkit on the PATH"
    return None


def assembler() -> pathlib.Path | None:
    """The compiler's last stage, ptxas."""
    spec = importlib.util.find_spec("nvidia")  # a folder that packages share
    folders = map(pathlib.Path, spec.submodule_search_locations or () if spec else ())
    found = (path for folder in folders for path in folder.glob("**/bin/ptxas"))
    on_path = [pathlib.Path(path) for path in [shutil.which("ptxas")] if path]
    return next(itertools.chain(found, on_path), None)


def description(gpu: GPU) -> str:
    """What XLA reads of it, a text protocol buffer."""
    major, minor = gpu.capability
    of_family = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: {gpu.shared_bytes}
          shared_memory_per_block_optin: {gpu.block_shared_bytes}
          threads_per_core_limit: {2048 if minor == 0 else 1536}
          core_count: {gpu.num_cores}
          fpus_per_core: {64 if gpu.capability == (8, 0) else 128}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {int(gpu.bandwidth)}
          l2_cache_size: {gpu.l2_bytes}
          clock_rate_ghz: {gpu.clock_ghz}
          device_memory_size: {gpu.memory_bytes}
          cuda_compute_capability {{ major: {major} minor: {minor}{of_family} }}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        device_description_str: "{KNOWN_AS.get(gpu.device_kind, gpu.device_kind)}"
    """


@functools.cache
def devices(gpu: GPU, devices_per_node: int = 1, num_nodes: int = 1) -> list[jax.Device]:
    """So many of these GPUs. They can be compiled for and nothing else."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=description(gpu), topology=f"1x{num_nodes}x{devices_per_node}"
    )
    return list(topology.devices)


@contextlib.contextmanager
def compiling_for(mesh: Mesh, *, optimized: bool = True) -> Iterator[dict[str, str | bool]]:
    """Within it, programs are lowered and compiled for a mesh of `devices`, or of CPUs that are there.

    Gives the options that XLA needs then: the code is as good as on a machine that has the GPUs, but for what is tried
    out there: there is no device to time candidates on. If not `optimized`, machine code is worse and comes sooner;
    memory and collectives are decided before. Several threads may be in it.
    """
    if mesh.devices.flat[0].platform == "cpu":
        yield {}
        return
    level = _OPTIMIZED if optimized else _QUICK | {"xla_gpu_kernel_cache_file": _kernel_cache()}
    with without_cache, jax.set_mesh(mesh):  # Pallas asks the mesh which GPU it is
        yield {"xla_gpu_autotune_level": "0", **level}


_OPTIMIZED: dict[str, str | bool] = {"xla_backend_optimization_level": "3"}
_QUICK: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
    "xla_gpu_disable_gpuasm_optimizations": True,
    "xla_gpu_enable_llvm_module_compilation_parallelism": True,  # or kernels are not kept
}


def _kernel_cache() -> str:
    """For XLA to keep what it compiled while this process lives: programs of similar meshes have much in common."""
    with _lock:
        directory = _temporary_directory()
    return f"{directory.name}/{threading.get_ident()}"  # a file that two write at once is lost


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="jaxinfer-kernels-")


_lock = threading.Lock()
