"""A pipeline whose microbatches rotate through the stages within one compiled loop.

Stage s works in tick t on item t - s, if there is one: what enters stage 0 in tick t leaves the last stage in tick
t + p - 1, of p stages. Item i is microbatch i % m in round i // m. With at least as many microbatches as stages an item
has left before its microbatch enters again, so what a round makes, a token, is there for the next: the pipeline fills
once for N rounds, N * m + p - 1 ticks, and not once for each (GPipe, arXiv:1811.06965, has m + p - 1 ticks a round).

All stages run one program (`shard_map` over `stage`, everything else is left to XLA), so it is the same for
one process and for many. Without stages this is a loop over the rounds, or nothing at all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxinfer.partitioning import Partitioner
from sharding_rules import axes as ax

T = TypeVar("T")
Choice = TypeVar("Choice")
Carry = TypeVar("Carry")

# (weights, cache, activations, work) -> (cache, activations) of the layers of one stage.
Stage = Callable[[Any, Any, jax.Array, Any], tuple[Any, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """`num_rounds` rounds of `num_microbatches` each, at least as many as there are stages.

    Attributes:
      stage: the layers of one stage. Weights begin with the stages, and there they do not; of the first dimension of
        a cache's arrays a stage has its part. Its `work` is what it needs to know of a microbatch, and `mask_work`
        makes work of it that leaves no trace.
    """

    partitioner: Partitioner
    stage: Stage
    mask_work: Callable[[Any, jax.Array], Any]  # (work, whether it counts)
    num_microbatches: int
    num_rounds: int = 1

    @property
    def num_stages(self) -> int:
        return self.partitioner.axis_size(ax.STAGE)

    @property
    def num_items(self) -> int:
        return self.num_rounds * self.num_microbatches

    @property
    def num_ticks(self) -> int:
        return self.num_items + self.num_stages - 1

    def run(
        self,
        weights: Any,
        cache: Any,
        carry: Carry,
        *,
        enter: Callable[[Carry, Any], jax.Array],
        work: Callable[[Carry], Any],
        leave: Callable[[Carry, Any, jax.Array], Carry],
    ) -> tuple[Any, Carry]:
        """The cache and what is carried on, when all items have left.

        `enter(carry, item)` gives the activations of an item that enters, `work(carry)` the work of all microbatches,
        whose arrays begin with them, and `leave(carry, item, activations)` takes in what left. At the start nothing
        leaves: then `item` is negative; and at the end what enters, beyond the last item, never leaves. `cache` is
        written in place.
        """

        def tick(t: Any, state: tuple[Any, jax.Array | None, Carry]) -> tuple[Any, jax.Array | None, Carry]:
            cache, ring, carry = state
            x = enter(carry, t)
            if self.num_stages == 1:
                cache, x = self.stage(weights, cache, x, self._work(work(carry), t))
                return cache, None, leave(carry, t, x)
            cache, ring, x = self._on_all_stages(weights, cache, ring, x, work(carry), t)
            return cache, ring, leave(carry, t - (self.num_stages - 1), x)

        if self.num_ticks == 1:
            cache, _, carry = tick(0, (cache, None, carry))
            return cache, carry
        ring = None if self.num_stages == 1 else self._empty_ring(jax.eval_shape(enter, carry, 0))
        cache, _, carry = lax.fori_loop(0, self.num_ticks, tick, (cache, ring, carry))
        return cache, carry

    def _work(self, works: Any, item: Any) -> Any:
        """Of an item."""
        microbatch = item % self.num_microbatches if self.num_microbatches > 1 else 0
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, microbatch, keepdims=False), works)

    def _empty_ring(self, entering: jax.ShapeDtypeStruct) -> jax.Array:
        """Activations on their way, [stages, D, S, E]: those that each stage works on next."""
        ring = jnp.zeros((self.num_stages, *entering.shape), entering.dtype)
        return self.partitioner.constrain(ring, (ax.LAYERS, ax.BATCH, None, None))

    def _on_all_stages(self, weights: Any, cache: Any, ring: Any, entering: jax.Array, works: Any, t: jax.Array) -> Any:
        """A tick: the cache, the ring turned by one stage, and the activations that left, on every device."""
        last, spec = self.num_stages - 1, PartitionSpec(ax.STAGE)

        def of_stage(weights, cache, ring, entering, works, t):
            weights, x = jax.tree.map(lambda a: a[0], (weights, ring))
            stage = lax.axis_index(ax.STAGE)
            item = t - stage
            is_live = (item >= 0) & (item < self.num_items)
            x = jnp.where(stage == 0, entering, x)
            cache, x = self.stage(weights, cache, x, self.mask_work(self._work(works, item), is_live))
            # In float32: XLA's CPU compiler aborts on a sum of bfloat16 over one axis of several.
            left = lax.psum(jnp.where(stage == last, x, 0).astype(jnp.float32), ax.STAGE).astype(x.dtype)
            x = lax.ppermute(x, ax.STAGE, [(i, (i + 1) % self.num_stages) for i in range(self.num_stages)])
            return cache, x[None], left

        everywhere = PartitionSpec()
        mapped = jax.shard_map(
            of_stage,
            mesh=self.partitioner.mesh,
            in_specs=(spec, spec, spec, everywhere, everywhere, everywhere),
            out_specs=(spec, spec, everywhere),
            axis_names={ax.STAGE},
            check_vma=False,
        )
        return mapped(weights, cache, ring, entering, works, t)


def on_stage(function: Callable[[Choice], T], choices: Sequence[Choice]) -> T:
    """function(choice of this device's stage), one choice for each stage. Traced once where all are the same."""
    different = [*dict.fromkeys(choices)]
    if len(different) == 1:
        return function(different[0])
    index = jnp.array([different.index(choice) for choice in choices])[lax.axis_index(ax.STAGE)]
    return lax.switch(index, [lambda choice=choice: function(choice) for choice in different])
