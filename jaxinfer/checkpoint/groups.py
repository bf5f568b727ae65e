"""Things that go together, by their size."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def groups(items: Iterable[T], num_bytes: Callable[[T], int], most_bytes: int) -> list[list[T]]:
    """Neighbours together, up to so many bytes; one that is larger is alone."""
    found: list[list[T]] = [[]]
    size = 0
    for item in items:
        if found[-1] and size + num_bytes(item) > most_bytes:
            found.append([])
            size = 0
        found[-1].append(item)
        size += num_bytes(item)
    return found
