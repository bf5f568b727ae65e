"""Turns what a user asks into a request that can run, or says why it cannot. Host only."""

import dataclasses
import hashlib
import itertools
import numbers
from collections.abc import Iterable, Iterator

from jaxinfer.generation_config import GenerationDefaults
from jaxinfer.output_text import OutputText
from jaxinfer.request import MAX_STOP_TOKEN_IDS, Request, SamplingParams
from jaxinfer.tokenizer import Tokenizer

Prompt = str | Iterable[int]

_CONTEXT_TOKENS = 16  # of the prompt, for the first word of the output: its leading space, its first bytes


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

    def make_request(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> Request:
        """A request for `prompt`. Raises ValueError, in one line, for one that cannot run."""
        if type(priority) is not int:
            raise ValueError(f"priority={priority!r}: must be an integer; lower runs first")
        token_ids = self._encode(prompt)
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"prompt of {len(token_ids)} tokens leaves no room to generate within --max_model_len="
                f"{self.max_model_len}; shorten it to {self.max_model_len - 1} tokens or raise --max_model_len"
            )
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer and the model has none; use stop_token_ids")
        stop_token_ids = self._stop_token_ids(params)
        number = next(self._numbers)
        stream = None
        if self.tokenizer is not None:
            stream = self.tokenizer.stream(params.skip_special_tokens, token_ids[-_CONTEXT_TOKENS:])
        return Request(
            number=number,
            prompt=prompt if isinstance(prompt, str) else None,
            token_ids=token_ids,
            params=params,
            stop_token_ids=stop_token_ids,
            max_tokens=min(params.max_tokens, self.max_model_len - len(token_ids)),
            seed=_seed_of(self.seed, number) if params.seed is None else params.seed,
            text=OutputText(stream, params.stop_strings),
            priority=priority,
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the model has no tokenizer, so prompts must be token ids")
            prompt = self.tokenizer.encode(prompt) if prompt else []
        token_ids = self._token_ids("prompt", prompt)
        if not token_ids:
            raise ValueError("the prompt is empty; give at least one character or token id")
        return token_ids

    def _stop_token_ids(self, params: SamplingParams) -> tuple[int, ...]:
        end = () if params.ignore_eos else self.generation.eos_token_ids
        own = self._token_ids("stop_token_ids", params.stop_token_ids or ())
        token_ids = tuple(dict.fromkeys((*end, *own)))
        if len(token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"{len(token_ids)} stop token ids, the model's {len(end)} included; at most {MAX_STOP_TOKEN_IDS}"
            )
        return token_ids

    def _token_ids(self, what: str, values: Iterable[int]) -> list[int]:
        """As plain ints, NumPy's too. JAX would silently read another token's row, so the host checks every id."""
        if not isinstance(values, Iterable):
            raise ValueError(f"{what}: {values!r} is neither a text nor token ids")
        values = list(values)
        for value in values:
            is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if not is_integer or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{what}: {value!r} is not a token id of the model; ids are integers in [0, {self.vocab_size})"
                )
        return [int(value) for value in values]


def _seed_of(engine_seed: int, number: int) -> int:
    """Of a request that names none; hashed, so that it is none of the small numbers that others choose."""
    return int.from_bytes(hashlib.sha256(f"{engine_seed} {number}".encode()).digest()[:4], "little")
