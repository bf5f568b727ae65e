"""How a parameter lies in a checkpoint tensor.

Parameters keep heads apart, [heads, head_dim, embed], so that a mesh splits whole heads; a Hugging Face
tensor has them merged, [heads * head_dim, embed]. A KV head that is repeated over devices is stored once.
"""

from sharding_rules import axes as ax

Slices = tuple[slice, ...]


def stored_shape(shape: tuple[int, ...], axes: ax.LogicalAxes, num_kv_heads: int) -> tuple[int, ...]:
    """Shape of the checkpoint tensor behind a parameter: kv_heads as stored, head_dim merged into its heads.

    (8, 64, 512) named (kv_heads, head_dim, embed), 2 heads stored -> (128, 512)
    """
    stored: list[int] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis == ax.HEAD_DIM:
            stored[-1] *= size
        else:
            stored.append(num_kv_heads if axis == ax.KV_HEADS else size)
    return tuple(stored)


def stored_slices(index: Slices, shape: tuple[int, ...], axes: ax.LogicalAxes, num_kv_heads: int) -> Slices:
    """The slices of the checkpoint tensor behind the shard `index` of a parameter.

    kv_heads 2:3 of 8 (2 stored, each on four devices), head_dim 0:64 of 64 -> rows 0:64
    """
    slices: list[slice] = []
    for where, size, axis in zip(index, shape, axes, strict=True):
        if axis == ax.HEAD_DIM:
            heads = slices[-1]
            slices[-1] = slice(heads.start * size, heads.stop * size)
            continue
        start, stop, _ = where.indices(size)
        repeats = size // num_kv_heads if axis == ax.KV_HEADS else 1
        slices.append(slice(start // repeats, (stop - 1) // repeats + 1))
    return tuple(slices)
