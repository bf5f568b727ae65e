"""Text deltas never retract and never show a stop string, however tokens cut them."""

import random

import pytest

from jaxinfer.output_text import OutputText


class Letters:
    """A token stream whose token i is the i-th letter of a text."""

    def __init__(self, text: str):
        self.text = text

    def add(self, token_ids: list[int]) -> str:
        return "".join(self.text[i] for i in token_ids)

    def finish(self) -> str:
        return ""


def run(text: str, stop: tuple[str, ...], cuts: list[int]) -> tuple[str, bool]:
    """Feeds `text` in pieces ending at `cuts`; checks that the visible text only grows."""
    output = OutputText(Letters(text), stop)  # pyright: ignore[reportArgumentType]
    seen, start = "", 0
    for cut in [*cuts, len(text)]:
        stopped = output.add(list(range(start, cut)))
        assert output.text.startswith(seen)
        seen, start = output.text, cut
        if stopped:
            output.finish()
            return output.text, True
    output.finish()
    return output.text, False


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("aaab", ("aab",), "a"),
        ("abababc", ("ababc",), "ab"),
        ("no end here", ("END",), "no end here"),
        ("almost EN", ("END",), "almost EN"),
        ("END", ("END",), ""),
    ],
)
def test_the_text_ends_before_the_first_stop_string(text: str, stop: tuple[str, ...], expected: str):
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(text)), rng.randint(0, len(text) - 1)))
        assert run(text, stop, cuts) == (expected, any(s in text for s in stop))


def test_an_ending_that_could_become_a_stop_string_is_held_back():
    output = OutputText(Letters("wait EN"), ("END",))  # pyright: ignore[reportArgumentType]
    output.add(list(range(7)))
    assert output.text == "wait "
    output.finish()
    assert output.text == "wait EN"


@pytest.mark.parametrize(("stop", "expected"), [(("END",), "one END"), (("END", "ENDS"), "one END"), (("e",), "one")])
def test_the_stop_string_may_be_part_of_the_text(stop: tuple[str, ...], expected: str):
    output = OutputText(Letters("one ENDS"), stop, include_stop=True)  # pyright: ignore[reportArgumentType]
    assert [output.add([i]) for i in range(len(expected))] == [False] * (len(expected) - 1) + [True]
    output.finish()
    assert output.text == expected


@pytest.mark.parametrize(("min_tokens", "expected"), [(2, "aa"), (3, "aaa"), (6, "aaaaaa")])
def test_no_stop_string_ends_within_the_first_tokens(min_tokens: int, expected: str):
    """It may begin there: "aaa" reaches over the border."""
    output = OutputText(
        Letters("a" * 10),  # pyright: ignore[reportArgumentType]
        ("aaa",),
        min_tokens=min_tokens + 2,
    )
    added = [output.add([i]) for i in range(10)]
    assert added.index(True) == min_tokens + 2
    assert output.text == "a" * min_tokens == expected
