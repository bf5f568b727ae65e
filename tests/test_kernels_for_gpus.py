"""Kernels compile for the GPUs that they are for, and fit into shared memory and registers. No GPU is needed."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import AttentionSpec, backend, backends
from pallas_kernels.paged_attention.pages import QuantizedPages
from tests import gpu_targets

pytestmark = pytest.mark.skipif(gpu_targets.missing() is not None, reason=str(gpu_targets.missing()))

SPILLED_BYTES = 64  # stores of a thread, of what did not fit into its registers; of kernels whose code XLA shows
ROWS, CHUNKS, CHUNK_TOKENS, NUM_PAGES, PAGES_EACH = 32, 4, 512, 4096, 64
LLAMA = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16, scale=128**-0.5)
GEMMA = dataclasses.replace(LLAMA, num_q_heads=16, head_dim=256, page_size=256, window=4096, soft_cap=50.0)
GPT_OSS = dataclasses.replace(LLAMA, num_q_heads=64, head_dim=64, page_size=64, window=128)
PHI_2 = dataclasses.replace(LLAMA, num_kv_heads=32, head_dim=80)
QWEN = dataclasses.replace(LLAMA, num_q_heads=28, num_kv_heads=4)
DEEPSEEK = dataclasses.replace(LLAMA, num_q_heads=128, num_kv_heads=1, head_dim=576, value_dim=512, page_size=64)
SPECS = {"llama": LLAMA, "gemma": GEMMA, "gpt_oss": GPT_OSS, "phi_2": PHI_2, "qwen": QWEN, "deepseek": DEEPSEEK}
RUNS = [
    *(("h100", name, "bfloat16", None) for name in SPECS),
    *((gpu, "llama", "bfloat16", None) for gpu in gpu_targets.EACH_CAPABILITY if gpu != "h100"),
    ("a6000-48g", "gemma", "float16", None),
    ("a6000-48g", "deepseek", "bfloat16", None),
    ("h100", "llama", "float32", None),
    ("h100", "llama", "bfloat16", "int8"),
    ("a100-80g", "gemma", "float16", "int8"),
    ("a6000-48g", "deepseek", "bfloat16", "int8"),
    *((gpu, "llama", "bfloat16", "float8_e4m3fn") for gpu in ("h100", "l40s", "b200")),
    ("h100", "deepseek", "bfloat16", "float8_e4m3fn"),
]


def arrays(spec: AttentionSpec, dtype: str, num_sequences: int) -> tuple[Any, Any, Any]:
    """Keys, values and block tables."""
    shape = (NUM_PAGES, spec.num_kv_heads, spec.page_size, spec.head_dim)
    pages: Any = jax.ShapeDtypeStruct(shape, spec.cache_dtype or dtype)
    if spec.cache_dtype is not None:
        pages = QuantizedPages(pages, jax.ShapeDtypeStruct(shape[:-1], jnp.float32))  # pyright: ignore[reportArgumentType]
    return pages, None if spec.value_dim else pages, jax.ShapeDtypeStruct((num_sequences, PAGES_EACH), jnp.int32)


def ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("name", [name for name in backends() if name != "xla"])
@pytest.mark.parametrize(("gpu", "model", "dtype", "cache_dtype"), RUNS)
def test_compiles_and_takes_the_room_that_is_planned(
    name: str, gpu: str, model: str, dtype: str, cache_dtype: str | None, tmp_path: pathlib.Path
):
    spec, module = dataclasses.replace(SPECS[model], cache_dtype=cache_dtype, dtype=dtype), backend(name)
    if reason := module.unsupported(spec, gpu_targets.devices(gpu)[0]):
        pytest.skip(reason)
    q = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    heads = (spec.num_q_heads, spec.head_dim)
    sinks = q((spec.num_q_heads,)) if model == "gpt_oss" else None

    def of_rows(q, k_pages, v_pages, block_tables, positions, sinks):
        return module.paged_attention(q, k_pages, v_pages, block_tables, positions, spec=spec, sinks=sinks)

    def of_prompts(q, k_pages, v_pages, block_tables, starts, lengths, sinks):
        prompts = (block_tables, starts, lengths)
        return module.ragged_paged_attention(q, k_pages, v_pages, *prompts, spec=spec, sinks=sinks)

    rows = (q((ROWS, 1, *heads)), *arrays(spec, dtype, ROWS), ids(ROWS, 1), sinks)
    prompts = (q((CHUNK_TOKENS, *heads)), *arrays(spec, dtype, CHUNKS), ids(CHUNKS), ids(CHUNKS), sinks)
    sizes = {
        "rows": ROWS,
        "chunks": CHUNKS,
        "chunk_tokens": CHUNK_TOKENS,
        "context_tokens": PAGES_EACH * spec.page_size,
    }
    planned = module.workspace_bytes(spec, **sizes, itemsize=jnp.dtype(dtype).itemsize)
    for function, shapes in ((of_rows, rows), (of_prompts, prompts)):
        dump = tmp_path / function.__name__
        compiled = gpu_targets.compile_for(gpu, function, *shapes, xla_dump_to=str(dump))
        memory, hlo = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None and hlo is not None
        assert memory.temp_size_in_bytes <= planned
        assert "attend_kernel" in hlo and "merge_kernel" in hlo
        kernels = {k: v for k, v in gpu_targets.resources(gpu, dump).items() if "attend_kernel" in k}
        assert all(taken.spilled_bytes <= SPILLED_BYTES for taken in kernels.values()), kernels
