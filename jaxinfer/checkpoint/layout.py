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


def stored_slices(
    index: Slices, shape: tuple[int, ...], axes: ax.LogicalAxes, num_kv_heads: int
) -> tuple[Slices, tuple[list[int], ...]]:
    """What to read for the shard `index` of a parameter.

    Returns the slices of the checkpoint tensor, and for each axis of the parameter the rows to take from
    what was read (after heads are apart again), which is where repeated KV heads are repeated.

    kv_heads 0:4 of 8 with 2 stored, head_dim 64 -> read rows 0:64, take head [0, 0, 0, 0].
    """
    slices: list[slice] = []
    takes: list[list[int]] = []
    for where, size, axis in zip(index, shape, axes, strict=True):
        start, stop, _ = where.indices(size)
        if axis == ax.HEAD_DIM:
            heads = slices[-1]
            slices[-1] = slice(heads.start * size, heads.stop * size)
            takes.append(list(range(start, stop)))
            continue
        repeats = size // num_kv_heads if axis == ax.KV_HEADS else 1
        first, last = start // repeats, (stop - 1) // repeats
        slices.append(slice(first, last + 1))
        takes.append([i // repeats - first for i in range(start, stop)])
    return tuple(slices), tuple(takes)
