"""Pages and what is known of them: no page lost, shared by mistake or handed out twice, whatever is asked for.

A state machine plays against a model of plain dicts, in which content is the tokens themselves and not a digest. The
long campaign:

    JAXINFER_TEST_RULES=2000000 pytest tests/test_page_allocator.py -s
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from jaxinfer.page_allocator import PageAllocator, device_and_row, extend_digests

NUM_RULES = int(os.environ.get("JAXINFER_TEST_RULES", "4000"))
NUM_USABLE_PAGES = 7
NUM_DEVICES = (1, 3)
PAGE_SIZE = 2

Content = tuple[bytes, tuple[int, ...]]  # salt, and all tokens up to the page's end
tokens = st.lists(st.integers(0, 1), max_size=3 * PAGE_SIZE)  # few, so that prefixes are often equal


@dataclasses.dataclass(eq=False)
class Sequence:
    """Somebody who holds pages."""

    salt: bytes
    token_ids: list[int]
    pages: list[int]
    digests: list[bytes] = dataclasses.field(default_factory=list)

    def content(self, page: int) -> Content:
        return self.salt, tuple(self.token_ids[: (page + 1) * PAGE_SIZE])


class AllocatorMachine(RuleBasedStateMachine):
    """What an allocator does against what it must do. `num_rules` counts the steps of all machines."""

    num_rules = 0
    num_devices = 1

    def __init__(self):
        super().__init__()
        type(self).num_rules -= 1  # the invariant is also checked before the first rule
        self.usable = range(self.num_devices, self.num_devices + NUM_USABLE_PAGES)
        self.allocator = PageAllocator(self.num_devices + NUM_USABLE_PAGES, self.num_devices)
        self.sequences: list[Sequence] = []
        self.holders: dict[int, int] = {}
        self.page_of: dict[Content, int] = {}
        self.idle: list[int] = []  # known content, held by nobody, last used last
        self.meaning: dict[bytes, Content] = {}  # of every digest ever seen

    def pick(self, data: st.DataObject) -> Sequence:
        return data.draw(st.sampled_from(self.sequences))

    def take(self, count: int, allocate: Callable[[], list[int]], last_pages: list[int] | None) -> list[int]:
        """Allocates where that must succeed; says which pages it must and must not have given, and in which order.

        Each behind one of `last_pages`; those that lack one behind each other.
        """
        blank = set(self.usable) - set(self.holders) - set(self.idle)
        num_evicted = max(0, count - len(blank))
        may_give = blank | set(self.idle[:num_evicted])
        pages = allocate()
        assert len(set(pages)) == count and set(pages) <= may_give and set(self.idle[:num_evicted]) <= set(pages)
        befores = [None, *pages] if last_pages is None else [*last_pages, *pages]
        for page, before in zip(pages, befores, strict=False):
            left = Counter(self.device(p) for p in may_give)
            following = -1 if before is None else (self.device(before) + 1) % self.num_devices
            wanted = {following} if left[following] else {d for d in left if left[d] == max(left.values())}
            assert self.device(page) in wanted, "a page is not on the next device, or on the one that has the most"
            may_give.remove(page)
        self.page_of = {content: page for content, page in self.page_of.items() if page not in pages}
        del self.idle[:num_evicted]
        self.holders |= dict.fromkeys(pages, 1)
        return pages

    def device(self, page: int) -> int:
        return device_and_row(page, self.num_devices)[0]

    def extend(self, sequence: Sequence) -> None:
        extend_digests(sequence.digests, sequence.token_ids, PAGE_SIZE, sequence.salt)
        assert len(sequence.digests) == len(sequence.token_ids) // PAGE_SIZE
        for page, digest in enumerate(sequence.digests):
            assert self.meaning.setdefault(digest, sequence.content(page)) == sequence.content(page)

    @rule(salt=st.sampled_from([b"", b"salt"]), token_ids=tokens, parent=st.data(), num_kept=st.integers(0, 8))
    def start(self, salt: bytes, token_ids: list[int], parent: st.DataObject, num_kept: int):
        """A new sequence, or one that shares the first tokens of another: as many cached pages as there are."""
        if self.sequences and num_kept:
            fork = self.pick(parent)
            salt, token_ids = fork.salt, fork.token_ids[:num_kept] + token_ids
        sequence = Sequence(salt, token_ids, [])
        self.extend(sequence)
        contents = [sequence.content(page) for page in range(len(sequence.digests))]
        first_miss = next((i for i, content in enumerate(contents) if content not in self.page_of), len(contents))
        expected = [self.page_of[content] for content in contents[:first_miss]]
        num_idle = sum(page in self.idle for page in expected)
        assert self.allocator.num_cached(sequence.digests) == (len(expected), num_idle)
        sequence.pages = self.allocator.share(sequence.digests)
        assert sequence.pages == expected
        for page in expected:
            self.holders[page] = self.holders.get(page, 0) + 1
        self.idle = [page for page in self.idle if page not in expected]
        self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), token_ids=tokens)
    def append(self, data: st.DataObject, token_ids: list[int]):
        sequence = self.pick(data)
        sequence.token_ids += token_ids
        self.extend(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(0, NUM_USABLE_PAGES + 1))
    def allocate(self, data: st.DataObject, count: int):
        if count > NUM_USABLE_PAGES - len(self.holders):
            with pytest.raises(RuntimeError, match=f"{count} pages asked for"):
                self.allocator.allocate(count)
        else:
            pages = self.pick(data).pages
            after = pages[-1] if pages else None
            pages += self.take(count, lambda: self.allocator.allocate(count, after), pages[-1:] or None)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def grow(self, data: st.DataObject):
        """A page for each of some sequences that have one, as far as there are pages."""
        growing = data.draw(st.lists(st.sampled_from(self.sequences), unique=True))
        growing = [sequence for sequence in growing if sequence.pages][: NUM_USABLE_PAGES - len(self.holders)]
        last = [sequence.pages[-1] for sequence in growing]
        pages = self.take(len(growing), lambda: self.allocator.extend(last), last)
        for sequence, page in zip(growing, pages, strict=True):
            sequence.pages.append(page)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data: st.DataObject):
        sequence = self.pick(data)
        for page, digest in zip(sequence.pages, sequence.digests, strict=False):
            content = self.meaning[digest]
            self.allocator.publish(page, digest)
            if content not in self.page_of and page not in self.page_of.values():
                self.page_of[content] = page

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject):
        sequence = self.pick(data)
        self.sequences.remove(sequence)
        self.allocator.free(sequence.pages)
        for page in reversed(sequence.pages):
            self.holders[page] -= 1
            if not self.holders[page]:
                del self.holders[page]
                self.idle += [page] if page in self.page_of.values() else []

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), wrong=st.integers(0, NUM_USABLE_PAGES + max(NUM_DEVICES)))
    def free_wrongly(self, data: st.DataObject, wrong: int):
        """A page that nobody holds, or one twice, among pages that are held."""
        pages = self.pick(data).pages
        if wrong in pages or wrong not in self.holders:
            with pytest.raises(RuntimeError, match="not all held"):
                self.allocator.free([*pages, wrong])

    @rule()
    def forget(self):
        self.allocator.forget()
        self.page_of, self.idle = {}, []

    @invariant()
    def agrees_with_the_model(self):
        type(self).num_rules += 1
        self.allocator.check()
        assert self.allocator.num_holders == self.holders
        assert self.allocator.num_free == NUM_USABLE_PAGES - len(self.holders)
        for sequence in self.sequences:
            cached = [content in self.page_of for content in map(sequence.content, range(len(sequence.digests)))]
            assert self.allocator.num_cached(sequence.digests)[0] == (cached + [False]).index(False)


@pytest.mark.parametrize("num_devices", NUM_DEVICES)
def test_allocator_agrees_with_plain_dicts(num_devices: int, monkeypatch: pytest.MonkeyPatch):
    """Batch by batch: hypothesis remembers every example of a run."""
    slow_is_fine = [HealthCheck.too_slow]
    options = settings(
        max_examples=40, stateful_step_count=100, deadline=None, database=None, suppress_health_check=slow_is_fine
    )
    monkeypatch.setattr(AllocatorMachine, "num_devices", num_devices)
    AllocatorMachine.num_rules = 0
    while AllocatorMachine.num_rules < NUM_RULES // len(NUM_DEVICES):
        run_state_machine_as_test(AllocatorMachine, settings=options)
    print(f"{num_devices} devices: {AllocatorMachine.num_rules} rule steps, violations 0")


def published(allocator: PageAllocator, token_ids: list[int], salt: bytes = b"") -> tuple[list[int], list[bytes]]:
    """New pages that hold `token_ids`, and their digests."""
    digests: list[bytes] = []
    extend_digests(digests, token_ids, PAGE_SIZE, salt)
    pages = allocator.allocate(len(digests))
    for page, digest in zip(pages, digests, strict=True):
        allocator.publish(page, digest)
    return pages, digests


def test_page_0_is_never_handed_out():
    allocator = PageAllocator(5)
    assert sorted(allocator.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="1 pages asked for, 0 free"):
        allocator.allocate(1)


def test_a_sequences_pages_are_on_the_devices_in_turn():
    """Scratch pages 0, 1 and 2, and two pages each; device 0 runs out while others have some."""
    allocator = PageAllocator(9, 3)
    first = allocator.allocate(2)
    assert first == [3, 4]
    assert allocator.allocate(1) == [5]  # on the device that has the most
    assert allocator.extend([4, 3]) == [8, 7]  # each on the device behind its own
    assert allocator.allocate(1, after=8) == [6]
    with pytest.raises(RuntimeError, match="1 pages asked for, 0 free"):
        allocator.extend(first[:1])
    allocator.check()


def test_where_the_next_device_has_none_another_gives_one():
    allocator = PageAllocator(6, 2)
    pages = allocator.allocate(4)
    allocator.free([pages[0], pages[2]])
    assert allocator.extend([pages[3], pages[3]]) == [pages[0], pages[2]]
    allocator.free([pages[0], pages[2]])
    assert allocator.allocate(2, after=pages[0]) == [pages[0], pages[2]]  # device 1 has none


def test_check_finds_a_page_on_another_device():
    allocator = PageAllocator(6, 2)
    allocator._free.reverse()
    with pytest.raises(AssertionError, match="another device"):
        allocator.check()


def test_pages_are_evicted_in_order_of_their_last_use():
    allocator = PageAllocator(4)
    pages, digests = zip(*(published(allocator, [i, i]) for i in range(3)), strict=True)
    for held in (pages[1], pages[0], pages[2]):
        allocator.free(held)
    allocator.free(allocator.share(digests[1]))  # used again: last now
    assert [allocator.allocate(1) for _ in range(3)] == [pages[0], pages[2], pages[1]]
    assert [allocator.num_cached(d) for d in digests] == [(0, 0)] * 3


def test_the_end_of_a_prefix_is_evicted_before_its_start():
    allocator = PageAllocator(4)
    pages, digests = published(allocator, [1, 2, 3, 4, 5, 6])
    allocator.free(pages)
    assert allocator.allocate(1) == pages[2:]
    assert allocator.num_cached(digests) == (2, 2)


@pytest.mark.parametrize("wrong", [0, 2, 4], ids=["scratch page", "twice", "not held"])
def test_a_wrong_free_is_refused_before_anything_is_freed(wrong: int):
    allocator = PageAllocator(5)
    pages = allocator.allocate(3)
    assert pages == [1, 2, 3]
    with pytest.raises(RuntimeError, match="not all held"):
        allocator.free([*pages, wrong])
    assert allocator.num_free == 1
    allocator.check()


def test_equal_content_is_published_once():
    allocator = PageAllocator(4)
    (first, digests), (second, _) = (published(allocator, [1, 2]) for _ in range(2))
    assert allocator.share(digests) == first
    allocator.free(second)
    assert allocator.num_cached(digests) == (1, 0)
    allocator.check()


def test_only_a_held_page_can_be_published():
    with pytest.raises(AssertionError, match="page 1 is not held"):
        PageAllocator(3).publish(1, b"digest")


def test_other_salts_share_nothing():
    allocator = PageAllocator(9)
    (_, ours), (_, theirs) = (published(allocator, [1, 2, 3, 4], salt) for salt in (b"ours", b"theirs"))
    assert not set(ours) & set(theirs)


def test_a_digest_stands_for_everything_before_it():
    """Equal tokens after other tokens are other keys and values."""
    digests: list[list[bytes]] = [[], []]
    extend_digests(digests[0], [1, 2, 3, 4], PAGE_SIZE, b"")
    extend_digests(digests[1], [9, 2, 3, 4], PAGE_SIZE, b"")
    assert not set(digests[0]) & set(digests[1])


def test_check_finds_a_lost_page():
    """The twin of the tests above: an allocator that forgets a page is found out."""
    allocator = PageAllocator(5)
    del allocator.num_holders[allocator.allocate(1)[0]]
    with pytest.raises(AssertionError, match="lost"):
        allocator.check()
