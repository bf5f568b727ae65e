"""Hands out cache pages and remembers what full ones hold. Host only: a page is an int.

    free -> held by one request or several -> free, or cached if what it holds is known -> held again, or evicted

A full page's content is known by its digest: sha256 over the digest of the page before it and its own tokens,
so that equal digests mean equal prefixes. Cached pages that nobody holds are evicted in order of their last use.

With `context` in the mesh the pages of a sequence are spread over several devices: on one after the other in turn, as
far as each has any, so that all have as much to attend over. Nothing relies on it.
"""

import array
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any


def extend_digests(digests: list[bytes], token_ids: Sequence[int], page_size: int, salt: bytes) -> None:
    """Appends the digests of the full pages of `token_ids` that `digests` lacks. Other salts give other digests."""
    for start in range(len(digests) * page_size, len(token_ids) - page_size + 1, page_size):
        before = digests[-1] if digests else hashlib.sha256(salt).digest()
        page = array.array("i", token_ids[start : start + page_size])
        digests.append(hashlib.sha256(before + page).digest())


def device_and_row(page: Any, num_devices: int) -> tuple[Any, Any]:
    """On which of a data shard's devices a page is, and where among the device's own. Ints, or arrays of them.

    So it does not depend on how many pages there are. Pages 0 to `num_devices` - 1 are the devices' scratch pages.
    """
    return page % num_devices, page // num_devices


class PageAllocator:
    """The pages of one data shard, of which every device has a scratch page that is never handed out.

    Attributes:
      num_devices: over which the pages are spread.
      num_usable_pages: on all of them.
      num_holders: of each page that is held.
    """

    def __init__(self, num_pages: int, num_devices: int = 1):
        self.num_devices = num_devices
        self.num_usable_pages = num_pages - num_devices
        # Of each device, popped from the end: low ids first.
        self._free = [[*range(num_devices + i, num_pages, num_devices)][::-1] for i in range(num_devices)]
        self.num_holders: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached and held by nobody, last used last

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give, cached ones included."""
        return self._num_blank + len(self._evictable)

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

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` pages that hold nothing of use, for one sequence. The caller has checked `num_free`.

        On the devices in turn: from the one behind page `after`'s on, or from the one that has the most.
        """
        self._evict_for(count)
        pages = []
        for _ in range(count):
            after = self._take(after)
            pages.append(after)
        self.num_holders.update(dict.fromkeys(pages, 1))
        return pages

    def extend(self, last_pages: Sequence[int]) -> list[int]:
        """A page more for each of the sequences that end with these. The caller has checked `num_free`."""
        self._evict_for(len(last_pages))
        pages = [self._take(page) for page in last_pages]
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
                    self._put_back(page)

    def forget(self) -> None:
        """Forgets what pages hold: the cache was lost, or must not be reused."""
        for page in self._evictable:
            self._put_back(page)
        self._evictable.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def check(self) -> None:
        """Raises AssertionError unless every usable page is free, held or evictable, and nothing twice."""
        free = {page for pages in self._free for page in pages}
        held, evictable = set(self.num_holders), set(self._evictable)
        assert len(free) == self._num_blank, "a page is free twice"
        for device, pages in enumerate(self._free):
            assert all(device_and_row(p, self.num_devices)[0] == device for p in pages), "a page is on another device"
        assert not free & held and not free & evictable and not held & evictable, "a page is in two states"
        usable = range(self.num_devices, self.num_devices + self.num_usable_pages)
        assert free | held | evictable == set(usable), "a page is lost"
        assert all(count > 0 for count in self.num_holders.values())
        assert {digest: page for page, digest in self._digest_of.items()} == self._page_of
        assert evictable == set(self._digest_of) - held, "a cached page that nobody holds must be evictable"

    @property
    def _num_blank(self) -> int:
        return sum(map(len, self._free))

    def _evict_for(self, count: int) -> None:
        """Until there are so many pages that hold nothing of use."""
        if count > self.num_free:
            raise RuntimeError(f"{count} pages asked for, {self.num_free} free")
        for _ in range(count - self._num_blank):
            page, _ = self._evictable.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
            self._put_back(page)

    def _take(self, after: int | None) -> int:
        """From the device behind page `after`'s; from the one that has the most where that has none."""
        of_device = [] if after is None else self._free[device_and_row(after + 1, self.num_devices)[0]]
        return (of_device or max(self._free, key=len)).pop()

    def _put_back(self, page: int) -> None:
        self._free[device_and_row(page, self.num_devices)[0]].append(page)

    def _find(self, digests: Sequence[bytes]):
        for digest in digests:
            if digest not in self._page_of:
                return
            yield self._page_of[digest]
