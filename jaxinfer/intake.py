"""Turns what a user asks into a request that can run, or says why it cannot. Host only."""

import dataclasses
import functools
import hashlib
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

from jaxinfer.generation_config import GenerationDefaults
from jaxinfer.output_text import OutputText
from jaxinfer.outputs import LogprobsRecord
from jaxinfer.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_STOP_TOKEN_IDS, Request
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.tokenizer import Tokenizer

Prompt = str | Iterable[int]
T, R = TypeVar("T"), TypeVar("R")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intake:
    """The limits that requests are checked against.

    Attributes:
      tokenizer: None for a model that runs on token ids only.
      generation: the model's defaults.
      vocab_size: of the model; every id that a user gives is below it.
      max_model_len: prompt and output tokens together.
      seed: base of the seeds of requests that name none.
    """

    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    vocab_size: int
    max_model_len: int
    seed: int
    _numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def make_requests(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> list[Request]:
        """The `params.n` requests of a prompt. Raises ValueError, in one line, for one that cannot run."""
        if type(priority) is not int:
            raise ValueError(f"priority={priority!r}: must be an integer; lower runs first")
        token_ids = encode_prompt(prompt, self.tokenizer, self.vocab_size)
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"prompt of {len(token_ids)} tokens leaves no room to generate within --max_model_len="
                f"{self.max_model_len}; shorten it to {self.max_model_len - 1} tokens or raise --max_model_len"
            )
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer and the model has none; use stop_token_ids")
        stop_token_ids, bad_words = self._stop_token_ids(params), self._bad_words(params)
        self._check_choice(params, stop_token_ids, bad_words)
        number = next(self._numbers)
        for _ in range(params.n - 1):
            next(self._numbers)
        return [
            Request(
                number=number + index,
                index=index,
                prompt=prompt if isinstance(prompt, str) else None,
                token_ids=[*token_ids],
                params=params,
                stop_token_ids=stop_token_ids,
                bad_words=bad_words,
                max_tokens=min(params.max_tokens, self.max_model_len - len(token_ids)),
                seed=_seed_of(self.seed, number + index) if params.seed is None else (params.seed + index) % 2**32,
                text=self._output_text(params, token_ids),
                priority=priority,
                logprobs=self._logprobs_record(params.logprobs),
                prompt_logprobs=self._logprobs_record(params.prompt_logprobs) if index == 0 else None,
            )
            for index in range(params.n)
        ]

    def _output_text(self, params: SamplingParams, prompt: list[int]) -> OutputText:
        stream = None
        if self.tokenizer is not None:
            stream = self.tokenizer.stream(params.skip_special_tokens, prompt)
        return OutputText(
            stream,
            params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _logprobs_record(self, num_top: int | None) -> LogprobsRecord | None:
        if num_top is None:
            return None
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=False) if self.tokenizer else None
        return LogprobsRecord(num_top, decode)

    def _stop_token_ids(self, params: SamplingParams) -> tuple[int, ...]:
        end = () if params.ignore_eos else self.generation.eos_token_ids
        own = check_token_ids("stop_token_ids", params.stop_token_ids or (), self.vocab_size)
        token_ids = tuple(dict.fromkeys((*end, *own)))
        if len(token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"{len(token_ids)} stop token ids, the model's {len(end)} included; at most {MAX_STOP_TOKEN_IDS}"
            )
        return token_ids

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """As token ids: each as it stands and, where that begins with another token, with a space before it."""
        if params.bad_words and self.tokenizer is None:
            raise ValueError("bad_words need a tokenizer and the model has none; use logit_bias")
        words: list[tuple[int, ...]] = []
        for text in params.bad_words or ():
            assert self.tokenizer is not None
            bare, spaced = (
                tuple(self.tokenizer.encode(start + text.lstrip(), add_special_tokens=False)) for start in ("", " ")
            )
            if not 0 < len(bare) <= MAX_BAD_WORD_TOKENS:
                raise ValueError(f"bad_words: {text!r} has {len(bare)} tokens; must be 1 to {MAX_BAD_WORD_TOKENS}")
            words.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:  # as in vLLM: others have the bare one inside
                words.append(spaced)
        if len(words) > MAX_BAD_WORDS:
            raise ValueError(
                f"bad_words: {len(params.bad_words or ())} texts are {len(words)} sequences of tokens; "
                f"at most {MAX_BAD_WORDS}"
            )
        return tuple(words)

    def _check_choice(
        self, params: SamplingParams, stop_token_ids: tuple[int, ...], bad_words: tuple[tuple[int, ...], ...]
    ) -> None:
        """Refuses ids that are none, and bans that leave no token to begin with."""
        check_token_ids("logit_bias", params.logit_bias or (), self.vocab_size)
        if params.allowed_token_ids is None:
            return
        allowed = set(check_token_ids("allowed_token_ids", params.allowed_token_ids, self.vocab_size))
        banned = {word[0] for word in bad_words if len(word) == 1} | {*(stop_token_ids if params.min_tokens else ())}
        if allowed <= banned:
            raise ValueError(f"allowed_token_ids={[*allowed]}: bad_words or min_tokens ban them all; allow one more")


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or several: a text, or a sequence of numbers, is one."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        several = cast(list[Prompt], list(prompts))
    except TypeError:
        raise ValueError(f"prompts: expected texts or token ids, found {prompts!r}") from None
    are_ids = [isinstance(prompt, numbers.Integral) for prompt in several]
    return [cast(Prompt, several)] if several and all(are_ids) else several


def read_each(prompts: Sequence[T], read: Callable[[T], R]) -> list[R]:
    """`read` of each. Its ValueErrors say which of several prompts it was."""
    found = []
    for i, prompt in enumerate(prompts):
        try:
            found.append(read(prompt))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}" if len(prompts) > 1 else str(error)) from None
    return found


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Token ids, a text's with the tokenizer's special tokens. Raises ValueError for an empty prompt and wrong ids."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("the model has no tokenizer, so prompts must be token ids")
        prompt = tokenizer.encode(prompt) if prompt else []
    token_ids = check_token_ids("prompt", prompt, vocab_size)
    if not token_ids:
        raise ValueError("the prompt is empty; give at least one character or token id")
    return token_ids


def check_token_ids(what: str, values: Iterable[int], vocab_size: int) -> list[int]:
    """As plain ints, NumPy's too. JAX would silently read another token's row, so the host checks every id."""
    if not isinstance(values, Iterable):
        raise ValueError(f"{what}: {values!r} is neither a text nor token ids")
    values = list(values)
    for value in values:
        is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_integer or not 0 <= value < vocab_size:
            raise ValueError(f"{what}: {value!r} is not a token id of the model; ids are integers in [0, {vocab_size})")
    return [int(value) for value in values]


def _seed_of(engine_seed: int, number: int) -> int:
    """Of a request that names none; hashed, so that it is none of the small numbers that others choose."""
    return int.from_bytes(hashlib.sha256(f"{engine_seed} {number}".encode()).digest()[:4], "little")
