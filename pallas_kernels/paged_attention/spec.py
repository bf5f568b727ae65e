"""What one attention layer computes, as static numbers."""

import dataclasses

import jax

from pallas_kernels.paged_attention.pages import LARGEST, SCALE_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Per device: the heads are those of the local shard.

    Attributes:
      num_q_heads, num_kv_heads: query head n reads KV head n // (num_q_heads / num_kv_heads).
      head_dim: of queries and keys, and of values unless `value_dim` says otherwise.
      page_size: tokens per page.
      scale: factor on the scores before softmax.
      window: cached tokens that a query sees, its own included; None: all.
      value_dim: values are the first so many numbers of the keys, and have no pages of their own; None: they have.
      soft_cap: c in c * tanh(score / c), which scores become before softmax (Gemma 2, arXiv:2408.00118); None: as is.
      cache_dtype: of what pages hold where that is quantised, "int8" or "float8_e4m3fn"; None: as queries are.
      context_size: devices over which the pages of a sequence are spread; with several, each computes a part.
      dtype: of queries, for what some backends cannot; None: as they come.
      device_kind: as JAX calls the device, for settings that are for it; None: nothing is known of it.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    scale: float
    window: int | None = None
    value_dim: int | None = None
    soft_cap: float | None = None
    cache_dtype: str | None = None
    context_size: int = 1
    dtype: str | None = None
    device_kind: str | None = None

    def __post_init__(self):
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"num_q_heads {self.num_q_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.cache_dtype not in (None, *LARGEST):
            raise ValueError(f"cache_dtype {self.cache_dtype!r} is unknown; known: None, {', '.join(LARGEST)}")

    @property
    def is_on_cpu(self) -> bool:
        """Whether the device is a CPU. One of which nothing is known is of the platform that JAX runs on here."""
        return (self.device_kind or jax.default_backend()) == "cpu"

    @property
    def out_dim(self) -> int:
        """Of values and of what comes out."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def token_numbers(self) -> int:
        """That the cache holds of a token, in one layer."""
        return self.num_kv_heads * self.head_dim * (2 if self.value_dim is None else 1)

    def token_bytes(self, itemsize: int) -> int:
        """That the cache holds of a token, in one layer, where queries have so many for a number."""
        if self.cache_dtype is None:
            return self.token_numbers * itemsize
        return self.token_numbers + self.token_numbers // self.head_dim * SCALE_BYTES

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads
