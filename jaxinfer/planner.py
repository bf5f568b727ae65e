"""Memory arithmetic: what fits on a device. Host only, ints in bytes."""

import dataclasses

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


def page_bytes(*, num_layers: int, num_kv_heads: int, page_size: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one page over all layers, for `num_kv_heads` heads on the device."""
    return 2 * num_layers * num_kv_heads * page_size * head_dim * itemsize  # 2: keys and values


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What one device holds.

    Attributes:
      weights_bytes: parameters on the device.
      slots_bytes: what sampling keeps of each sequence that may run: a bias per token of the vocabulary, mostly.
      page_bytes: one cache page over all layers.
      num_pages: pages on the device, the scratch page included.
      page_size: tokens per page.
      max_model_len: tokens of the longest sequence.
      num_shards: data shards, each with so many pages of its own.
      free_bytes: free memory of the device before anything was allocated; None if it does not say.
    """

    weights_bytes: int
    slots_bytes: int
    page_bytes: int
    num_pages: int
    page_size: int
    max_model_len: int
    num_shards: int
    free_bytes: int | None

    @property
    def cache_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def num_cache_tokens(self) -> int:
        """Tokens that fit, over all shards."""
        return self.num_shards * (self.num_pages - 1) * self.page_size  # 1: the scratch page

    @property
    def max_concurrency(self) -> int:
        """Sequences of max_model_len tokens that fit at once."""
        return self.num_shards * ((self.num_pages - 1) // pages_per_sequence(self.max_model_len, self.page_size))

    def __str__(self) -> str:
        free = "unknown" if self.free_bytes is None else format_bytes(self.free_bytes)
        return (
            f"memory per device: {format_bytes(self.weights_bytes)} weights + {format_bytes(self.cache_bytes)} cache "
            f"+ {format_bytes(self.slots_bytes)} sampling of {free} free\n"
            f"cache: {self.num_cache_tokens} tokens in {self.num_shards * (self.num_pages - 1)} pages of "
            f"{self.page_size}, {format_bytes(self.page_bytes / self.page_size)} per token; "
            f"{self.max_concurrency} sequences of {self.max_model_len} tokens at once"
        )


def pages_per_sequence(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def plan_memory(
    *,
    weights_bytes: int,
    slots_bytes: int,
    page_bytes: int,
    page_size: int,
    max_model_len: int,
    sequences_per_shard: int,
    num_shards: int,
    free_bytes: int | None,
    memory_fraction: float,
    kv_cache_bytes: int | None,
) -> MemoryPlan:
    """Sizes the cache: `kv_cache_bytes` if given, else what the sequences can use as far as memory goes.

    Raises ValueError when the weights do not fit, or the pages left cannot hold one longest sequence.
    """
    budget = None if free_bytes is None else int(free_bytes * memory_fraction)
    fixed_bytes = weights_bytes + slots_bytes
    if budget is not None and fixed_bytes > budget:
        raise ValueError(
            f"weights of {format_bytes(weights_bytes)} and {format_bytes(slots_bytes)} for sampling per device do not "
            f"fit: {format_bytes(free_bytes or 0)} are free and --memory_fraction={memory_fraction} allows "
            f"{format_bytes(budget)}; split the weights with --mesh=tensor:N, or lower --max_num_seqs"
        )
    per_sequence = pages_per_sequence(max_model_len, page_size)
    num_pages = 1 + sequences_per_shard * per_sequence  # 1: the scratch page
    if kv_cache_bytes is not None:
        num_pages = min(num_pages, kv_cache_bytes // page_bytes)
        limit, flag = kv_cache_bytes, f"--kv_cache_bytes={kv_cache_bytes}"
    else:
        limit = num_pages * page_bytes if budget is None else budget - fixed_bytes
        num_pages = min(num_pages, limit // page_bytes)
        flag = f"--memory_fraction={memory_fraction}"
    if num_pages - 1 < per_sequence:
        fits = max(0, num_pages - 1) * page_size
        raise ValueError(
            f"{flag} leaves {format_bytes(limit)} for the cache, {fits} tokens; one sequence of --max_model_len="
            f"{max_model_len} needs {format_bytes((per_sequence + 1) * page_bytes)}: use "
            f"--kv_cache_bytes={(per_sequence + 1) * page_bytes} or more, or --max_model_len={fits} or less"
        )
    if budget is not None and kv_cache_bytes is not None and fixed_bytes + num_pages * page_bytes > budget:
        raise ValueError(
            f"weights and sampling of {format_bytes(fixed_bytes)} and --kv_cache_bytes={kv_cache_bytes} exceed the "
            f"{format_bytes(budget)} that --memory_fraction={memory_fraction} allows; use --kv_cache_bytes="
            f"{budget - fixed_bytes} or less"
        )
    return MemoryPlan(
        weights_bytes=weights_bytes,
        slots_bytes=slots_bytes,
        page_bytes=page_bytes,
        num_pages=num_pages,
        page_size=page_size,
        max_model_len=max_model_len,
        num_shards=num_shards,
        free_bytes=free_bytes,
    )
