"""What a step has to do on a device, as numbers. Host only."""

from typing import NamedTuple


class Load(NamedTuple):
    """What a step does in each data shard.

    Attributes:
      rows: sequences that decode.
      context: tokens that each of them has cached, on average.
      chunk_tokens: tokens of prompts.
      chunk_context: tokens that each of these sees, on average.
    """

    rows: int
    context: float
    chunk_tokens: int = 0
    chunk_context: float = 0.0


class AttentionLoad(NamedTuple):
    """Of one layer on one device.

    Attributes:
      num_q_heads: on the device.
      head_dim, out_dim: of keys, and of values.
      token_bytes: that the cache has of a token there.
      window: tokens that a query sees; None: all.
    """

    num_q_heads: int
    head_dim: int
    out_dim: int
    token_bytes: int
    window: int | None

    def seen(self, num_tokens: float) -> float:
        """Of so many tokens."""
        return num_tokens if self.window is None else min(num_tokens, self.window)

    def flops(self, num_tokens: float) -> float:
        """Of a query that sees so many tokens, if there is no window."""
        return 2 * self.num_q_heads * (self.head_dim + self.out_dim) * self.seen(num_tokens)


class LayerKind(NamedTuple):
    """Slots for layers that cost the same on a device."""

    attention: AttentionLoad
    has_experts: bool
    num_slots: int
