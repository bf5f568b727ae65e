"""Hands out cache pages. Host only: a page is an int."""


class PageAllocator:
    """The free pages of one data shard. Page 0 is the scratch page and is never handed out."""

    def __init__(self, num_pages: int):
        self.num_usable_pages = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))  # popped from the end: low ids first
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages. The caller has checked `num_free`."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages asked for, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        self._held.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Takes pages back. Raises RuntimeError for a page that is not held, before any is taken."""
        if not self._held.issuperset(pages) or len(set(pages)) != len(pages):
            raise RuntimeError(f"pages {sorted(pages)} are not all held")
        self._held.difference_update(pages)
        self._free.extend(pages)

    def check(self) -> None:
        """Raises AssertionError unless every usable page is either free or held, once."""
        assert len(self._free) == len(set(self._free)), "a page is free twice"
        assert not self._held.intersection(self._free), "a page is both free and held"
        assert len(self._free) + len(self._held) == self.num_usable_pages, "a page is lost"
        assert 0 not in self._held and 0 not in self._free, "the scratch page was handed out"
