"""Arithmetic of counts: of pages, rows and devices. Host only."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. 7, 2 -> 4."""
    return -(-a // b)
