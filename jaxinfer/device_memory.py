"""What to say when a device runs out of memory all the same: in bytes, beside what was planned."""

import contextlib
import re
from collections.abc import Iterator

import jax

from jaxinfer.planner import EncoderMemoryPlan, MemoryPlan, format_bytes

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in the message of XLA's error
_WANTED = re.compile(r"allocat\w* (\d+) bytes")


@contextlib.contextmanager
def accounted(plan: MemoryPlan | EncoderMemoryPlan, doing: str) -> Iterator[None]:
    """Raises RuntimeError, in one line, where a device runs out of memory inside."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        raise RuntimeError(_explained(plan, doing, str(error))) from error


def _explained(plan: MemoryPlan | EncoderMemoryPlan, doing: str, message: str) -> str:
    match = _WANTED.search(message)
    wanted = int(match[1]) if match else None
    text = f"a device ran out of memory while {doing}"
    if wanted is not None:
        text += f", for {format_bytes(wanted)} more"
    text += f"; {str(plan).splitlines()[0].replace('memory per device:', 'planned per device:')}"
    if not isinstance(plan, MemoryPlan):
        return f"{text}; use smaller --max_model_len, --max_num_batched_tokens or --memory_fraction"
    pages = (plan.cache_bytes - (wanted or plan.workspace_bytes)) // plan.page_bytes
    least = 1 + -(-plan.max_model_len // (plan.page_size * plan.context_size))
    if pages < least:
        return f"{text}; use a smaller --max_model_len or a larger --mesh, or end what else uses the device"
    return f"{text}; would fit if that is all: --kv_cache_bytes={pages * plan.page_bytes}"
