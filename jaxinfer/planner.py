"""Memory arithmetic: what fits on a device. Host only, ints in bytes."""

import dataclasses

from jaxinfer.integers import cdiv

GIB = 2**30
MIB = 2**20
KIB = 2**10


def format_bytes(num_bytes: float) -> str:
    """As "1.50 GiB", "3.2 MiB", "12.0 KiB" or "99 B"."""
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} B"


def page_bytes(*, num_layers: int, token_bytes: int, page_size: int) -> int:
    """Of one page over all layers, each with so many bytes of a token on the device."""
    return num_layers * token_bytes * page_size


def workspace_bytes(
    *,
    residual_bytes: int,
    num_residuals: int,
    projections_bytes: int,
    attention_bytes: int,
    mlp_bytes: int,
    sampling_bytes: int,
) -> int:
    """Most bytes that a step needs on one device beside weights and cache: an estimate.

    Projections to heads, attention, MLP and sampling follow each other and use the same memory, so the largest counts;
    all but sampling beside as many residual streams as the compiler keeps: XLA for GPUs keeps what attention and MLP
    add beside the stream, until a fusion adds them. Three are there at least, normalised and added to.
    XLA was seen to allocate as much, or up to a third less, in float32 on a CPU, where bfloat16 takes more, because it
    is computed in float32.
    """
    beside_residuals = max(projections_bytes, attention_bytes, mlp_bytes)
    return max(3 * residual_bytes, num_residuals * residual_bytes + beside_residuals, sampling_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """What one device has to hold, but for the number of pages.

    Attributes:
      weights_bytes: parameters on the device.
      workspace_bytes: estimate of what steps need beside weights and cache.
      kept_bytes: of that, what sampling keeps of each slot from step to step; the rest is temporary.
      page_bytes: one cache page over all layers.
      page_size: tokens per page.
      max_model_len: tokens of the longest sequence.
      num_shards: data shards.
      context_size: devices over which the pages of a sequence are spread; of each data shard.
      free_bytes: free memory of the device before anything was allocated; None if it does not say.
      unreachable_pages: as many as these on a device the attention cannot read; fewer or more it can.
    """

    weights_bytes: int
    workspace_bytes: int
    kept_bytes: int
    page_bytes: int
    page_size: int
    max_model_len: int
    num_shards: int
    context_size: int
    free_bytes: int | None
    unreachable_pages: range = range(0)

    @property
    def temporary_bytes(self) -> int:
        return self.workspace_bytes - self.kept_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan(MemoryNeeds):
    """What one device holds.

    Attributes:
      num_pages: on the device, the scratch page included.
    """

    num_pages: int

    @property
    def cache_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def pages_per_shard(self) -> int:
        """On all devices of a data shard, scratch pages included."""
        return self.context_size * self.num_pages

    @property
    def usable_pages_per_shard(self) -> int:
        return self.context_size * (self.num_pages - 1)  # 1: the scratch page

    @property
    def num_cache_tokens(self) -> int:
        """Tokens that fit, over all shards."""
        return self.num_shards * self.usable_pages_per_shard * self.page_size

    @property
    def max_concurrency(self) -> int:
        """Sequences of max_model_len tokens that fit at once."""
        return self.num_shards * (self.usable_pages_per_shard // cdiv(self.max_model_len, self.page_size))

    def __str__(self) -> str:
        free = "unknown" if self.free_bytes is None else format_bytes(self.free_bytes)
        return (
            f"memory per device: {format_bytes(self.weights_bytes)} weights + {format_bytes(self.cache_bytes)} cache "
            f"+ {format_bytes(self.workspace_bytes)} workspace of {free} free\n"
            f"cache: {self.num_cache_tokens} tokens in {self.num_shards * self.usable_pages_per_shard} pages of "
            f"{self.page_size}, {format_bytes(self.page_bytes / self.page_size)} per token; "
            f"{self.max_concurrency} sequences of {self.max_model_len} tokens at once"
        )


class DoesNotFit(ValueError):
    """What is asked of a device's memory is more than it has.

    Attributes:
      short: the same in the bytes alone.
      excess_bytes: by which it is more.
    """

    def __init__(self, message: str, short: str, excess_bytes: int):
        super().__init__(message)
        self.short, self.excess_bytes = short, excess_bytes


def plan_memory(
    needs: MemoryNeeds, *, sequences_per_shard: int, memory_fraction: float, kv_cache_bytes: int | None
) -> MemoryPlan:
    """Sizes a device's cache: `kv_cache_bytes` if given, else what the sequences can use as far as memory goes.

    Raises DoesNotFit when the pages that memory or `kv_cache_bytes` allows cannot hold one longest sequence.
    """
    page_bytes, context_size, free_bytes = needs.page_bytes, needs.context_size, needs.free_bytes
    per_sequence = cdiv(needs.max_model_len, needs.page_size)
    num_pages = 1 + cdiv(sequences_per_shard * per_sequence, context_size)  # 1: the scratch page
    needed = (1 + cdiv(per_sequence, context_size)) * page_bytes
    share = f" of each of its {context_size} devices" if context_size > 1 else ""
    of_sequence = f"the {needed} bytes that one sequence of --max_model_len={needs.max_model_len} needs{share}"
    if kv_cache_bytes is not None:
        num_pages = min(num_pages, kv_cache_bytes // page_bytes)
        if kv_cache_bytes < needed:
            text = f"--kv_cache_bytes={kv_cache_bytes} is less than {of_sequence}"
            raise DoesNotFit(text, text, needed - kv_cache_bytes)
    if free_bytes is not None:
        allowed = int(free_bytes * memory_fraction)
        room = max(0, allowed - needs.weights_bytes - needs.workspace_bytes)
        if kv_cache_bytes is None:
            num_pages = min(num_pages, room // page_bytes)
        if room < max(needed, num_pages * page_bytes):
            weights, workspace, free = map(format_bytes, (needs.weights_bytes, needs.workspace_bytes, free_bytes))
            wanted = of_sequence if room < needed else f"--kv_cache_bytes={kv_cache_bytes}"
            cache = max(needed, num_pages * page_bytes)
            held, parts = (
                needs.weights_bytes + needs.workspace_bytes + cache,
                f"{weights} weights + {workspace} workspace",
            )
            raise DoesNotFit(
                f"{weights} of weights and {workspace} of workspace leave {room} bytes for the cache of {free} free on "
                f"a device (--memory_fraction={memory_fraction}), less than {wanted}",
                f"{parts} + {format_bytes(cache)} cache > {format_bytes(allowed)} a device",
                held - allowed,
            )
    if num_pages in needs.unreachable_pages:
        num_pages = needs.unreachable_pages.start - 1
    return MemoryPlan(**vars(needs), num_pages=num_pages)


def encoder_workspace_bytes(
    *, rows: int, length: int, num_heads: int, embed_dim: int, mlp_dim: int, itemsize: int
) -> int:
    """Most bytes that an encoder's step needs on one device beside the weights: an estimate.

    For `rows` texts of `length` tokens; heads and `mlp_dim` are those on the device. Attention and MLP follow each
    other and use the same memory.
    """
    scores = 3 * 4 * rows * num_heads * length**2  # 3: scores, their exponentials and the weights, in float32
    mlp = 2 * rows * length * mlp_dim * itemsize  # 2: before and after the activation
    activations = 5 * rows * length * embed_dim * itemsize  # 5: what is added to, queries, keys, values and their mix
    return max(scores, mlp) + activations


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderMemoryPlan:
    """What one device holds of an encoder, which has no cache.

    Attributes:
      weights_bytes: parameters on the device.
      workspace_bytes: estimate of what steps need beside them.
      free_bytes: free memory of the device before anything was allocated; None if it does not say.
    """

    weights_bytes: int
    workspace_bytes: int
    free_bytes: int | None

    def __str__(self) -> str:
        free = "unknown" if self.free_bytes is None else format_bytes(self.free_bytes)
        return (
            f"memory per device: {format_bytes(self.weights_bytes)} weights + {format_bytes(self.workspace_bytes)} "
            f"workspace of {free} free"
        )

    def check_fits(self, memory_fraction: float) -> None:
        """Raises ValueError unless weights and workspace fit into `memory_fraction` of the free memory."""
        needed = self.weights_bytes + self.workspace_bytes
        if self.free_bytes is not None and needed > (room := int(self.free_bytes * memory_fraction)):
            sizes = "" if self.weights_bytes > room else ", or smaller --max_model_len, --max_num_batched_tokens"
            raise ValueError(
                f"{format_bytes(self.weights_bytes)} of weights and {format_bytes(self.workspace_bytes)} of workspace "
                f"are more than the {format_bytes(room)} that --memory_fraction={memory_fraction} allows of "
                f"{format_bytes(self.free_bytes)} free on a device; use --dtype=bfloat16, a larger --mesh{sizes}"
            )
