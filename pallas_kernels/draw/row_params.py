"""How the rows of a batch are drawn, as kernels take it."""

from typing import Any, NamedTuple


class RowParams(NamedTuple):
    """Of each row, [B]; as `jaxinfer.sampling.SamplingArrays` has them."""

    temperature: Any  # float32; 0: the likeliest
    top_k: Any  # int32; 0 keeps all
    top_p: Any  # float32; 1 keeps all
    min_p: Any  # float32; 0 keeps all
    seed: Any  # uint32
    position: Any  # uint32
