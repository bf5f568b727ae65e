"""Text that streams without being taken back, wherever characters and tokens begin and end."""

import random

import pytest

from jaxinfer.tokenizer import TextStream, Tokenizer
from tests.tokenizer.directory import TEXTS


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("piece", [1, 3, 20, 1000])
def test_streamed_text_is_the_text_and_whole_characters(tokenizer: Tokenizer, text: str, piece: int):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    deltas = [stream.add(ids[i : i + piece]) for i in range(0, len(ids), piece)]
    assert all("\ufffd" not in delta for delta in deltas) or "\ufffd" in text
    assert "".join(deltas) + stream.finish() == text


@pytest.mark.parametrize("piece", [1, 7, 60])
def test_tokens_that_are_no_text_are_never_lost_or_repeated(tokenizer: Tokenizer, piece: int):
    """Random ids make broken UTF-8. What streams must hold every character that is not broken, in order.

    Without ASCII as byte tokens, which a byte-fallback decoder gives up as soon as a broken byte follows.
    """
    rng = random.Random(0)
    words = tokenizer._tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    pool = [i for i, word in enumerate(words) if not word.startswith(tuple(f"<0x{digit}" for digit in range(8)))]
    for _ in range(30):
        ids = rng.choices(pool, k=60)
        stream = tokenizer.stream()
        streamed = "".join(stream.add(ids[i : i + piece]) for i in range(0, 60, piece)) + stream.finish()
        ascii_only = [character for character in tokenizer.decode(ids) if character.isascii()]
        assert [character for character in streamed if character.isascii()] == ascii_only


@pytest.mark.parametrize("text", [*TEXTS, "ab 😀😀 c", "a😀"])
def test_a_stream_goes_on_wherever_the_prompt_ends(tokenizer: Tokenizer, text: str):
    """In the middle of a character, too: its first bytes belong to the prompt, and it comes out whole."""
    ids = tokenizer.encode(text)
    for size in range(1, len(ids)):
        before = tokenizer.decode(ids[:size])
        num_whole = next(n for n in range(size, -1, -1) if not tokenizer.decode(ids[:n]).endswith("\ufffd"))
        whole = tokenizer.decode(ids[:num_whole])
        stream = tokenizer.stream(after=ids[:size])
        streamed = "".join(stream.add([i]) for i in ids[size:]) + stream.finish()
        assert streamed == text[len(before if text.startswith(before) else whole) :], size


def test_a_character_that_the_prompt_broke_off_and_nothing_completes_is_the_prompts(tokenizer: Tokenizer):
    stream = tokenizer.stream(after=tokenizer.encode("up 😀")[:-2])
    assert stream.add(tokenizer.encode("me")[-2:]) + stream.finish() == "me"


def test_half_a_character_is_released_at_the_end(tokenizer: Tokenizer):
    ids = tokenizer.encode("ok 😀")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.add([i]) for i in ids) == "ok "
    assert set(stream.finish()) == {"\ufffd"}


def test_cost_per_token_does_not_grow(tokenizer: Tokenizer):
    """Neither ordinary text, nor skipped special tokens, nor bytes that never become a character fill the window."""
    sizes: list[int] = []

    def decode(ids: list[int]) -> str:
        sizes.append(len(ids))
        return tokenizer.decode(ids)

    lone_byte = tokenizer.encode("😀")[-1]
    for ids in (tokenizer.encode(TEXTS[0]) * 8, [tokenizer.eos_token_id or 0] * 300, [lone_byte] * 300):
        for piece in (1, len(ids)):
            stream = TextStream(decode)
            for start in range(0, len(ids), piece):
                stream.add(ids[start : start + piece])
            stream.finish()
    assert max(sizes) <= TextStream._PIECE + 2 * TextStream._MAX_HELD
