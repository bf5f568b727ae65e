"""Arithmetic of counts: of pages, rows and devices. Host only."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. 7, 2 -> 4."""
    return -(-a // b)


def powers(first: int, last: int, factor: int) -> tuple[int, ...]:
    """first, first * factor, ... below last, then last itself."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)


def round_up(size: int, buckets: tuple[int, ...]) -> int:
    """The first of `buckets`, which ascend, that holds `size`."""
    for bucket in buckets:
        if size <= bucket:
            return bucket
    raise RuntimeError(f"size {size} is beyond the largest compiled shape, {buckets[-1]}")
