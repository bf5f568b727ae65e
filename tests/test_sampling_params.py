"""What a user may ask for, and the one line that refuses the rest."""

import pathlib
from typing import Any

import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.generation_config import GenerationDefaults
from jaxinfer.intake import Intake
from jaxinfer.resolve import DEMO_MODEL
from jaxinfer.tokenizer import load_tokenizer
from tests import tiny_model

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, r"n=0: must be an integer in \[1, 1024\]"),
        ({"n": 10**6}, r"n=1000000: must be an integer in \[1, 1024\]"),
        ({"n": 2, "temperature": 0}, "n=2: must be 1 with temperature=0"),
        ({"presence_penalty": 2.1}, r"presence_penalty=2.1: must be a number in \[-2, 2\]"),
        ({"presence_penalty": NAN}, "presence_penalty=nan"),
        ({"frequency_penalty": -2.1}, r"frequency_penalty=-2.1: must be a number in \[-2, 2\]"),
        ({"frequency_penalty": True}, "frequency_penalty=True"),
        ({"repetition_penalty": 0}, r"repetition_penalty=0: must be a number in \[0.01, 100\]"),
        ({"repetition_penalty": INF}, "repetition_penalty=inf"),
        ({"min_tokens": -1}, r"min_tokens=-1: must be an integer in \[0, 16\]"),
        ({"min_tokens": 6, "max_tokens": 5}, r"min_tokens=6: must be an integer in \[0, 5\]"),
        ({"logprobs": 21}, r"logprobs=21: must be an integer in \[0, 20\]"),
        ({"logprobs": True}, "logprobs=True: must be an integer"),
        ({"prompt_logprobs": -1}, r"prompt_logprobs=-1: must be an integer in \[0, 20\]"),
        ({"logit_bias": {5: 101}}, r"logit_bias\[5\]=101: must be a number in \[-100, 100\]"),
        ({"logit_bias": {5: NAN}}, r"logit_bias\[5\]=nan"),
        ({"logit_bias": [5]}, r"logit_bias=\[5\]: expected numbers by token id"),
        ({"allowed_token_ids": ()}, "allowed_token_ids=.*: give at least one token id"),
        ({"bad_words": ("a", "")}, r"bad_words=.*: expected non-empty strings"),
        ({"bad_words": (5,)}, r"bad_words=.*: expected non-empty strings"),
        ({"bad_words": 5}, "bad_words=5: expected a list"),
        ({"stop_token_ids": 5}, "stop_token_ids=5: expected a list"),
        ({"allowed_token_ids": 5}, "allowed_token_ids=5: expected a list"),
        ({"stop": (5,)}, r"stop=.*: expected non-empty strings"),
    ],
)
def test_out_of_range(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, False),
        ({"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 1, "stop": "x", "n": 1}, False),
        ({"prompt_logprobs": 3, "stop_token_ids": (1,), "ignore_eos": True, "logit_bias": {}, "bad_words": ()}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"min_tokens": 1}, True),
        ({"logprobs": 0}, True),
        ({"logit_bias": {1: 1}}, True),
        ({"allowed_token_ids": (1,)}, True),
        ({"bad_words": "x"}, True),
    ],
    ids=str,
)
def test_who_needs_the_full_sampler(fields: dict[str, Any], needs: bool):
    assert SamplingParams(**fields).needs_full_sampler == needs


def test_an_unknown_name_raises_with_the_closest_known_one():
    with pytest.raises(TypeError, match="has no field 'frequency_penality'; did you mean 'frequency_penalty'"):
        SamplingParams(frequency_penality=1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="has no field 'best_of'"):
        SamplingParams(best_of=2)  # pyright: ignore[reportCallIssue]


def make_intake(model_dir: pathlib.Path | None, vocab_size: int) -> Intake:
    tokenizer = load_tokenizer(model_dir) if model_dir else None
    generation = GenerationDefaults(eos_token_ids=(2,))
    return Intake(tokenizer=tokenizer, generation=generation, vocab_size=vocab_size, max_model_len=50, seed=0)


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory) -> Intake:
    return make_intake(tiny_model.make(tmp_path_factory.mktemp("models") / "tiny"), 264)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {264: 1}}, r"logit_bias: 264 is not a token id of the model; ids are integers in \[0, 264\)"),
        ({"logit_bias": {-1: 1}}, "logit_bias: -1 is not a token id"),
        ({"logit_bias": {"5": 1}}, "logit_bias: '5' is not a token id"),
        ({"allowed_token_ids": (3, 264)}, "allowed_token_ids: 264 is not a token id"),
        ({"allowed_token_ids": (3, True)}, "allowed_token_ids: True is not a token id"),
        ({"allowed_token_ids": (2, 64), "min_tokens": 1, "bad_words": "a"}, r"allowed_token_ids=\[.*ban them all"),
        ({"bad_words": "a" * 9}, "bad_words: 'aaaaaaaaa' has 9 tokens; must be 1 to 8"),
        ({"bad_words": "  "}, "bad_words: '  ' has 0 tokens; must be 1 to 8"),
        ({"bad_words": [*map(chr, range(33, 98))]}, "bad_words: 65 texts are 65 sequences of tokens; at most 64"),
    ],
)
def test_what_the_model_or_the_devices_do_not_have(intake: Intake, fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        intake.make_requests([1], SamplingParams(**fields))


def test_what_leaves_a_token_is_taken(intake: Intake):
    for fields in (
        {"allowed_token_ids": (2, 64), "bad_words": "a"},
        {"allowed_token_ids": (64,), "min_tokens": 1, "bad_words": ("ab", "b")},
        {"allowed_token_ids": np.arange(3), "logit_bias": {np.int64(5): 1}},
    ):
        assert len(intake.make_requests([1], SamplingParams(**fields))) == 1


def test_bad_words_need_a_tokenizer():
    with pytest.raises(ValueError, match="bad_words need a tokenizer and the model has none; use logit_bias"):
        make_intake(None, 264).make_requests([1], SamplingParams(bad_words="x"))


def test_bad_words_are_banned_with_and_without_a_space():
    """As vLLM does it: with the space if that is another first token and no more tokens."""
    intake = make_intake(DEMO_MODEL, 10**6)
    tokenizer = intake.tokenizer
    assert tokenizer is not None
    encode = lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    (request,) = intake.make_requests([1], SamplingParams(bad_words=(" king", "kingqz!")))
    assert encode(" king") != encode("king") and len(encode(" king")) == len(encode("king"))
    assert request.bad_words[:2] == (encode("king"), encode(" king"))
    assert request.bad_words[2] == encode("kingqz!") and len(request.bad_words) in (3, 4)


def test_outputs_of_one_prompt_have_an_id_in_common_and_seeds_of_their_own(intake: Intake):
    first = intake.make_requests([1], SamplingParams(n=3, seed=2**32 - 2))
    (other,) = intake.make_requests([1], SamplingParams())
    assert [request.seed for request in first] == [2**32 - 2, 2**32 - 1, 0]
    assert len({request.request_id for request in first}) == 1 and other.request_id != first[0].request_id
    assert len({request.number for request in [*first, other]}) == 4
    unseeded = intake.make_requests([1], SamplingParams(n=3, prompt_logprobs=1))
    assert len({request.seed for request in unseeded}) == 3
    assert [request.prompt_logprobs is None for request in unseeded] == [False, True, True]
