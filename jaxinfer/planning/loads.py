"""What a step has to do on a device, as numbers. Host only."""

from typing import NamedTuple

from jaxinfer.integers import cdiv


class Load(NamedTuple):
    """What a step does in each data shard.

    Attributes:
      rows: sequences that decode.
      context: tokens that each of them has cached, on average.
      chunk_tokens: tokens of prompts.
      chunk_context: tokens that each of these sees, on average.
      chunk_spread: tokens that the last of them sees beyond what the first does; None: they follow each other.
      num_prompts: that have equal parts of them.
      num_chunks: prompts that the step is compiled for: a token is drawn for each.
      padding: tokens beside them that nobody needs.
    """

    rows: int
    context: float
    chunk_tokens: int = 0
    chunk_context: float = 0.0
    chunk_spread: float | None = None
    num_prompts: int = 1
    num_chunks: int = 1
    padding: int = 0

    @property
    def padded_chunk(self) -> int:
        return self.chunk_tokens + self.padding

    @property
    def num_tokens(self) -> int:
        return self.rows + self.padded_chunk

    @property
    def num_drawn(self) -> int:
        return self.rows + (self.num_chunks if self.chunk_tokens else 0)

    def share(self, num_parts: int) -> "Load":
        """The largest of so many parts of it, with tokens of all prompts where there are not as many."""
        shared = ("rows", "chunk_tokens", "num_prompts", "num_chunks", "padding")
        return self._replace(**{name: cdiv(getattr(self, name), num_parts) for name in shared})


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

    def seen(self, context: float, spread: float = 0.0) -> float:
        """Of so many tokens, on average where they are from half of `spread` fewer to half of it more, evenly."""
        fewest, most = context - spread / 2, context + spread / 2
        if self.window is None or most <= self.window:
            return context
        if fewest >= self.window:
            return self.window
        within, beyond = self.window - fewest, most - self.window
        return (within * (fewest + self.window) / 2 + beyond * self.window) / spread

    def flops(self, num_seen: float) -> float:
        """Of a query that sees so many tokens."""
        return 2 * self.num_q_heads * (self.head_dim + self.out_dim) * num_seen

    def row_work(self, load: Load) -> tuple[float, float]:
        """FLOPs, and bytes of the cache that are read."""
        seen = self.seen(load.context)
        return load.rows * self.flops(seen), load.rows * self.token_bytes * seen

    def chunk_work(self, load: Load) -> tuple[float, float]:
        """FLOPs and bytes, with the cache read once for the part of a prompt that is there."""
        each = load.chunk_tokens / load.num_prompts
        spread = each if load.chunk_spread is None else load.chunk_spread
        end = load.chunk_context + each / 2
        read = end if self.window is None else min(end, self.window + each)
        return (
            load.chunk_tokens * self.flops(self.seen(load.chunk_context, spread)),
            load.num_prompts * self.token_bytes * read,
        )


class LayerKind(NamedTuple):
    """Slots for layers that cost the same on a device."""

    attention: AttentionLoad
    has_experts: bool
    num_slots: int
