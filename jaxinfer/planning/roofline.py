"""How long a step takes on each device of a mesh, from what it has to read, multiply and send. Host only.

Products take as long as the slower of memory and arithmetic (Williams et al. 2009, "Roofline"). Of attention both are
added: a CPU gathers pages before it multiplies them, and on a GPU one of them is next to nothing. All of it comes one
after another; collectives are not hidden behind them, as XLA does not by default. A pipeline is a sequence of turns, in
each of which every stage computes a microbatch.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from jaxinfer.config import MoEConfig
from jaxinfer.layouts import AxisSplits
from jaxinfer.planning.clusters import Cluster
from jaxinfer.planning.hardware import Link
from jaxinfer.planning.loads import LayerKind, Load
from jaxinfer.planning.weight_shapes import DeviceWeights, MeshWeights
from jaxinfer.stages import num_microbatches
from sharding_rules import axes as ax

_FLOAT32 = 4
_ROUNDS = 2  # in which tokens that are routed at random get to their experts: `expert_exchange`


class Collective(NamedTuple):
    """That a device takes part in.

    Attributes:
      op: as XLA calls it.
      mesh_axes: along which the devices lie.
      num_bytes: of what comes out on each, in one.
      times: how many of these.
    """

    op: str
    mesh_axes: tuple[str, ...]
    num_bytes: float
    times: int = 1

    def seconds(self, group_size: int, link: Link) -> float:
        """A ring's time: each device sends its part to the others once, and for a sum twice."""
        if group_size == 1:
            return 0.0
        if self.op == "collective-permute":
            return self.times * (link.latency_s + self.num_bytes / link.bytes_per_s)
        passes = 2 if self.op == "all-reduce" else 1
        sent = passes * (group_size - 1) / group_size * self.num_bytes
        return self.times * (link.latency_s + sent / link.bytes_per_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, by what they go to; `fill_s` to stages that wait for others. See `MeshModel.step_time`."""

    weights_s: float = 0.0
    products_s: float = 0.0
    attention_s: float = 0.0
    sampling_s: float = 0.0
    collectives_s: float = 0.0
    overhead_s: float = 0.0
    fill_s: float = 0.0

    @property
    def total_s(self) -> float:
        return sum(vars(self).values())

    @property
    def parts(self) -> dict[str, float]:
        """By names for people."""
        return {
            "reading weights": self.weights_s,
            "arithmetic": self.products_s,
            "attention": self.attention_s,
            "sampling": self.sampling_s,
            "collectives": self.collectives_s,
            "launches": self.overhead_s,
            "pipeline fill": self.fill_s,
        }

    @property
    def bound(self) -> str:
        """What takes the most."""
        return max(self.parts, key=self.parts.__getitem__)

    def __mul__(self, factor: float) -> "StepTime":
        return StepTime(**{name: factor * value for name, value in vars(self).items()})

    def __add__(self, other: "StepTime") -> "StepTime":
        return StepTime(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshModel:
    """A decoder on a mesh of devices, as numbers.

    Attributes, where the name does not say it:
      layers: the slots for layers on a device, by kind.
      itemsize: bytes of an activation's number.
      is_exchanged: whether tokens travel to the devices that have their experts.
    """

    cluster: Cluster
    splits: AxisSplits
    weights: MeshWeights
    layers: tuple[LayerKind, ...]
    moe: MoEConfig | None
    embed_dim: int
    vocab_size: int
    itemsize: int
    is_exchanged: bool

    @property
    def num_stages(self) -> int:
        return self.splits.axis_size(ax.STAGE)

    def num_microbatches(self, load: Load) -> int:
        return num_microbatches(self.num_stages, load.padded_chunk, self.cluster.platform)

    def step_time(self, load: Load, num_steps: int = 1) -> StepTime:
        """Of one token of every row, in a dispatch of `num_steps` of them, and of the prompts' tokens.

        A pipeline of p stages does m microbatches in m + p - 1 turns, and n tokens of each row in n * m + p - 1.
        """
        parts, part = self._microbatches(load)
        turn, (times, of_head) = self._turn_time(part), self._heads(load)
        head, step = self._head_time(of_head), StepTime(overhead_s=self.cluster.rates.step_s / num_steps)
        fill = (turn if load.chunk_tokens else turn + head).total_s * (self.num_stages - 1) / num_steps
        return dataclasses.replace(turn * parts + head * times + step, fill_s=fill)

    def work(self, load: Load) -> tuple[float, float]:
        """FLOPs of a step on a device, in products and attention, and the bytes of weights and cache it reads for them.

        Of the stage that has the most weights, which it reads for each of its microbatches.
        """
        (parts, part), (times, of_head) = self._microbatches(load), self._heads(load)
        done = [(parts * flops, parts * num_bytes) for flops, num_bytes in self._attention(part)]
        done += [(parts * flops, parts * num_bytes) for num_bytes, flops, _ in self._stage_products(part)]
        done += [(times * flops, times * num_bytes) for num_bytes, flops, _ in self._head_products(of_head)]
        return sum(flops for flops, _ in done), sum(num_bytes for _, num_bytes in done)

    def turn_flops(self, load: Load) -> float:
        """Of products in a turn and of the head on a device, without those of experts and of attention: as compiled."""
        (_, part), (_, of_head) = self._microbatches(load), self._heads(load)
        stage = max(of_stage.dense_numbers for of_stage in self.weights.stages)
        return 2 * (stage * part.num_tokens + self.weights.head.dense_numbers * of_head.num_drawn)

    def _microbatches(self, load: Load) -> tuple[int, Load]:
        """How many, and each one's share."""
        parts = self.num_microbatches(load)
        return parts, load.share(parts)

    def _heads(self, load: Load) -> tuple[int, Load]:
        """How often a step multiplies by the head, and for what: rows as they leave the stages, or all at once."""
        return (1, load) if load.chunk_tokens else self._microbatches(load)

    def _product_time(self, products: Iterator[tuple[float, float, float]]) -> StepTime:
        rates = self.cluster.rates
        read = multiplied = 0.0
        for num_bytes, flops, at_once in products:
            memory, arithmetic = num_bytes / rates.bytes_per_s, flops / rates.flops_at(at_once)
            read, multiplied = (read + memory, multiplied) if memory >= arithmetic else (read, multiplied + arithmetic)
        return StepTime(weights_s=read, products_s=multiplied)

    def _head_time(self, load: Load) -> StepTime:
        """Sampling is on every device from the logits of the whole vocabulary, which come together first."""
        logits = Collective("all-gather", self.splits.mesh_axes(ax.VOCAB), load.num_drawn * self.vocab_size * _FLOAT32)
        others = StepTime(
            sampling_s=load.num_drawn * self.vocab_size / self.cluster.rates.logits_per_s,
            collectives_s=self._seconds(logits),
        )
        return self._product_time(self._head_products(load)) + others

    def _turn_time(self, load: Load) -> StepTime:
        """Of the layers of a stage."""
        rates = self.cluster.rates
        waits = sum(map(self._seconds, self.turn_collectives(load)))
        waits += sum(
            kind.num_slots * sum(map(self._seconds, self.layer_collectives(kind, load.num_tokens)))
            for kind in self.layers
        )
        others = StepTime(
            attention_s=sum(
                num_bytes / rates.attention_bytes_per_s + flops / rates.attention_flops
                for flops, num_bytes in self._attention(load)
            ),
            collectives_s=waits,
            overhead_s=sum(kind.num_slots for kind in self.layers) * (rates.layer_s + rates.token_s * load.num_tokens),
        )
        return self._product_time(self._stage_products(load)) + others

    def _stage_products(self, load: Load) -> Iterator[tuple[float, float, float]]:
        """As `_products`, of the layers of the stage that has the most."""
        return self._products(max(self.weights.stages, key=lambda of_stage: of_stage.num_bytes), load.num_tokens)

    def _head_products(self, load: Load) -> Iterator[tuple[float, float, float]]:
        return self._products(self.weights.head, load.num_drawn)

    def _products(self, work: DeviceWeights, num_tokens: float) -> Iterator[tuple[float, float, float]]:
        """Bytes read, FLOPs, and tokens at once: of what all tokens are multiplied by, and of experts."""
        yield work.dense_bytes, 2 * work.dense_numbers * num_tokens, num_tokens
        if self.moe is not None and work.expert_bytes:
            together = num_tokens * (self.splits.num_shards(ax.EXPERTS) if self.is_exchanged else 1)
            share = self.moe.num_experts_per_token / self.moe.num_experts
            touched = 1 - (1 - share) ** together
            yield touched * work.expert_bytes, 2 * work.expert_numbers * together, max(1, together * share)

    def _attention(self, load: Load) -> Iterator[tuple[float, float]]:
        """FLOPs, and bytes of the cache that are read: of layers of each kind for their rows, and for chunks."""
        for layer, _, num_slots in self.layers:
            times = num_slots / self.splits.context_size
            for flops, num_bytes in (layer.row_work(load), layer.chunk_work(load)):
                yield times * flops, times * num_bytes

    def _seconds(self, collective: Collective) -> float:
        size = math.prod(map(self.splits.axis_size, collective.mesh_axes))
        return collective.seconds(size, self.cluster.link_of(collective.mesh_axes, self.splits.sizes))

    def layer_collectives(self, kind: LayerKind, num_tokens: float) -> list[Collective]:
        """Of one layer, for so many tokens of each data shard in a turn."""
        hidden = num_tokens * self.embed_dim * self.itemsize
        splits, found = self.splits, []
        if splits.context_size > 1:
            layer = kind.attention
            of_heads = num_tokens * layer.num_q_heads * _FLOAT32
            found += [
                Collective("all-reduce", splits.context_axes, of_heads),
                Collective("all-reduce", splits.context_axes, of_heads * (layer.out_dim + 1)),
            ]
        found.append(Collective("all-reduce", splits.mesh_axes(ax.HEADS), hidden))
        if not kind.has_experts:
            return [*found, Collective("all-reduce", splits.mesh_axes(ax.MLP), hidden)]
        assert self.moe is not None
        if self.moe.shared_mlp_dim:
            found.append(Collective("all-reduce", splits.mesh_axes(ax.MLP), hidden))
        parts = splits.mesh_axes(ax.EXPERT_MLP)
        if not self.is_exchanged:
            return [*found, Collective("all-reduce", (*splits.mesh_axes(ax.EXPERTS), *parts), hidden)]
        travelling = hidden * self.moe.num_experts_per_token
        return [
            *found,
            Collective("all-to-all", splits.mesh_axes(ax.EXPERTS), travelling, 2 * _ROUNDS),
            Collective("all-reduce", parts, hidden),
        ]

    def turn_collectives(self, load: Load) -> list[Collective]:
        """Of a turn, beside its layers: looking tokens up, and what goes on to the next stage."""
        hidden = load.num_tokens * self.embed_dim * self.itemsize
        found = [Collective("all-reduce", self.splits.mesh_axes(ax.VOCAB), hidden)]
        if self.num_stages > 1:
            found += [
                Collective("collective-permute", (ax.STAGE,), hidden),
                Collective("all-reduce", (ax.STAGE,), hidden),
            ]
        return found
