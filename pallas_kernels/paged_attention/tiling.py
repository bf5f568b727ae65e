"""How the queries of a kernel's program are laid out, and what of that is tuned."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.triton_launch import MIN_DOT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """What changes the speed alone.

    Attributes:
      max_rows: queries of a tile, tokens times heads; a power of two, at least `MIN_DOT`.
      block_tokens: cached tokens that are multiplied at once; a power of two, at least `MIN_DOT`.
      extra_items, min_blocks: as `work_list.make` has them.
      num_warps: of a program, 32 threads each; a power of two.
      num_stages: blocks that a program has loaded or is loading.
    """

    max_rows: int
    block_tokens: int
    extra_items: int
    min_blocks: int
    num_warps: int
    num_stages: int

    def __post_init__(self):
        least = {"max_rows": MIN_DOT, "block_tokens": MIN_DOT, "num_warps": 1}
        for name, value in vars(self).items():
            if name in least and (value < least[name] or value & (value - 1)):
                raise ValueError(f"{name} is {value}; expected a power of two, {least[name]} or more")
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the queries that a program has are rows: token by token, all its heads of each. Then copies of the last.

    Attributes:
      max_tokens: most new tokens that a sequence has.
    """

    spec: AttentionSpec
    tuning: Tuning
    max_tokens: int

    @property
    def heads(self) -> int:
        """Of a tile: as many of those that share a KV head as there is room for, and all tiles alike."""
        divisors = (n for n in range(self.spec.group_size, 0, -1) if self.spec.group_size % n == 0)
        return next(n for n in divisors if n <= self.tuning.max_rows)

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return min(self.max_tokens, self.tuning.max_rows // self.heads)

    @property
    def rows(self) -> int:
        return max(MIN_DOT, 1 << (self.tokens * self.heads - 1).bit_length())

    @property
    def num_programs(self) -> int:
        """Of an item: over all heads."""
        return self.spec.num_q_heads // self.heads

    def kv_head(self, program: Any) -> Any:
        return program * self.heads // self.spec.group_size

    def row(self, first_token: jax.Array, num_tokens: jax.Array, program: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token and head of each row, int32 [rows]."""
        row = jnp.minimum(jnp.arange(self.rows, dtype=jnp.int32), num_tokens * self.heads - 1)
        return first_token + lax.div(row, self.heads), program * self.heads + lax.rem(row, self.heads)
