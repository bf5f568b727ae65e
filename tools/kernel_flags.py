"""The flags by which the benchmark of attention and the search for its settings are told of which attention."""

import jax
from absl import flags

from jaxinfer.engine_config import KV_CACHE_DTYPES
from pallas_kernels.paged_attention import AttentionSpec

_HEADS = flags.DEFINE_list("heads", ["32", "8", "128"], "Query heads, KV heads, numbers of a head.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "Tokens per page.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of queries and cache.")
_CACHE_DTYPE = flags.DEFINE_enum("kv_cache_dtype", "auto", [*KV_CACHE_DTYPES], "Quantises the cache to 8 bits.")


def spec() -> AttentionSpec:
    """On the device that jax uses."""
    num_q_heads, num_kv_heads, head_dim = map(int, _HEADS.value)
    return AttentionSpec(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=_PAGE_SIZE.value,
        scale=head_dim**-0.5,
        cache_dtype=KV_CACHE_DTYPES[_CACHE_DTYPE.value],
        dtype=DTYPE.value,
        device_kind=jax.devices()[0].device_kind,
    )
