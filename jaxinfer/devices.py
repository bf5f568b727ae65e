"""Which devices there are. Functions that say so must run before jax is imported."""

import os
import pathlib
import sys

from jaxinfer import host_memory


def set_num_cpu_devices(count: int) -> None:
    """Gives the CPU platform `count` virtual devices. Call before jax is imported.

    Raises RuntimeError afterwards, when the setting would be ignored.
    """
    if "jax" in sys.modules:
        raise RuntimeError("set_num_cpu_devices must be called before jax is imported")
    add_xla_flag(f"--xla_force_host_platform_device_count={count}")
    # XLA's CPU client sizes its thread pool by this. With fewer threads than devices a collective waits for ever
    # for participants that have no thread to run on.
    os.environ.setdefault("PJRT_NPROC", str(max(32, 4 * count)))


def add_xla_flag(flag: str) -> None:
    """As if XLA_FLAGS had it, at the end, where it counts. Call before jax uses a device."""
    os.environ["XLA_FLAGS"] = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), flag)))


def prefer_cpu() -> None:
    """Makes JAX run on the CPU, unless JAX_PLATFORMS says otherwise. Call before jax is imported."""
    if not os.environ.get("JAX_PLATFORMS"):  # JAX takes an empty one for none
        os.environ["JAX_PLATFORMS"] = "cpu"


def check_accelerator(allow_cpu: bool) -> None:
    """Raises RuntimeError when an NVIDIA GPU is here but JAX would run on the CPU, unless `allow_cpu`."""
    import jax

    if allow_cpu or jax.default_backend() != "cpu" or not has_nvidia_gpu():
        return
    raise RuntimeError(
        "an NVIDIA GPU is present but JAX runs on the CPU: install its plugin with "
        'pip install "jaxinfer[cuda12]" (or [cuda13]), unset JAX_PLATFORMS, or run on the CPU with --allow_cpu'
    )


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU to this process."""
    gpus = pathlib.Path("/proc/driver/nvidia/gpus")
    return pathlib.Path("/dev/nvidia0").exists() or (gpus.is_dir() and any(gpus.iterdir()))


def free_bytes(device) -> int | None:
    """Memory that the jax device can still allocate; None if it does not say.

    CPU devices share the host's memory, so each gets an equal part of what this process may still use.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if device.platform != "cpu" or (available := host_memory.available_bytes()) is None:
        return None
    return available // device.client.device_count()
