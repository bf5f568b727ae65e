"""What one attention layer computes, as static numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Per device: the heads are those of the local shard.

    Attributes:
      num_q_heads, num_kv_heads: query head n reads KV head n // (num_q_heads / num_kv_heads).
      head_dim: of queries, keys and values.
      page_size: tokens per page.
      scale: factor on the scores before softmax.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    scale: float

    def __post_init__(self):
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"num_q_heads {self.num_q_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads
