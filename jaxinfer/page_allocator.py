"""Hands out cache pages and remembers what full ones hold. Host only: a page is an int.

    free -> held by one request or several -> free, or cached if what it holds is known -> held again, or evicted

A full page's content is known by its digest: sha256 over the digest of the page before it and its own tokens,
so that equal digests mean equal prefixes. Cached pages that nobody holds are evicted in order of their last use.
"""

import array
import hashlib
from collections import OrderedDict
from collections.abc import Sequence


def extend_digests(digests: list[bytes], token_ids: Sequence[int], page_size: int, salt: bytes) -> None:
    """Appends the digests of the full pages of `token_ids` that `digests` lacks. Other salts give other digests."""
    for start in range(len(digests) * page_size, len(token_ids) - page_size + 1, page_size):
        before = digests[-1] if digests else hashlib.sha256(salt).digest()
        page = array.array("i", token_ids[start : start + page_size])
        digests.append(hashlib.sha256(before + page).digest())


class PageAllocator:
    """The pages of one data shard. Page 0 is the scratch page and is never handed out."""

    def __init__(self, num_pages: int):
        self.num_usable_pages = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))  # popped from the end: low ids first
        self.num_holders: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached and held by nobody, last used last

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give, cached ones included."""
        return len(self._free) + len(self._evictable)

    def num_cached(self, digests: Sequence[bytes]) -> tuple[int, int]:
        """How many of the first pages are cached, and how many of those nobody holds."""
        pages = [*self._find(digests)]
        return len(pages), sum(page in self._evictable for page in pages)

    def share(self, digests: Sequence[bytes]) -> list[int]:
        """Takes hold of the cached pages with the first digests, up to the first that is not cached."""
        pages = [*self._find(digests)]
        for page in pages:
            self._evictable.pop(page, None)
            self.num_holders[page] = self.num_holders.get(page, 0) + 1
        return pages

    def allocate(self, count: int) -> list[int]:
        """`count` pages that hold nothing of use. The caller has checked `num_free`."""
        if count > self.num_free:
            raise RuntimeError(f"{count} pages asked for, {self.num_free} free")
        while len(self._free) < count:
            page, _ = self._evictable.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        self.num_holders.update(dict.fromkeys(pages, 1))
        return pages

    def publish(self, page: int, digest: bytes) -> None:
        """Says what a held page holds from now on. Does nothing if another page is known to hold the same."""
        assert page in self.num_holders, f"page {page} is not held"
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def free(self, pages: Sequence[int]) -> None:
        """Lets go of pages, in order of position. RuntimeError for one that is not held, before any is let go of."""
        if len(set(pages)) != len(pages) or not all(page in self.num_holders for page in pages):
            raise RuntimeError(f"pages {sorted(pages)} are not all held")
        for page in reversed(pages):  # of one prefix the end is evicted first: without its start it is of no use
            self.num_holders[page] -= 1
            if not self.num_holders[page]:
                del self.num_holders[page]
                if page in self._digest_of:
                    self._evictable[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """Forgets what pages hold: the cache was lost, or must not be reused."""
        self._free += self._evictable
        self._evictable.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def check(self) -> None:
        """Raises AssertionError unless every usable page is free, held or evictable, and nothing twice."""
        free, held, evictable = set(self._free), set(self.num_holders), set(self._evictable)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & held and not free & evictable and not held & evictable, "a page is in two states"
        assert free | held | evictable == set(range(1, self.num_usable_pages + 1)), "a page is lost"
        assert all(count > 0 for count in self.num_holders.values())
        assert {digest: page for page, digest in self._digest_of.items()} == self._page_of
        assert evictable == set(self._digest_of) - held, "a cached page that nobody holds must be evictable"

    def _find(self, digests: Sequence[bytes]):
        for digest in digests:
            if digest not in self._page_of:
                return
            yield self._page_of[digest]
