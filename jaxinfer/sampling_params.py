"""What a user may ask of the tokens of a request. Host only."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from jaxinfer.unknown_names import StrictFields

MAX_LOGPROBS = 20  # per token; as many are computed for all when one asks
_MAX_N = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams(StrictFields):
    """How to choose tokens, and when to stop. Names, defaults and meanings are vLLM's.

    Attributes:
      n: outputs per prompt.
      temperature: divides the logits; 0 is greedy.
      top_k: draw among the k likeliest tokens; 0 or -1 for all.
      top_p: draw among the likeliest tokens whose probabilities reach top_p; 1 for all.
      min_p: draw among the tokens at least min_p times as likely as the likeliest; 0 for all.
      presence_penalty: subtracted from the logits of tokens that the output has.
      frequency_penalty: the same for each time that the output has them.
      repetition_penalty: makes tokens that prompt or output have unlikelier, above 1, or likelier, below.
      seed: of this request's draws, in [0, 2**32); None for one derived from the engine's seed.
      max_tokens: most tokens to generate.
      min_tokens: before so many neither a stop token nor a stop string ends the output.
      stop: strings that end the output.
      stop_token_ids: token ids that end the output besides the model's own end tokens.
      include_stop_str_in_output: what ended the output is part of its text.
      ignore_eos: go on past the model's end tokens.
      logprobs: report the log-probability of each token and of this many likeliest ones; None for no report.
      prompt_logprobs: the same for the tokens of the prompt.
      logit_bias: added to the logits of these token ids.
      allowed_token_ids: no others are drawn; None for all.
      bad_words: texts that the output will not have, each as it stands and with a space before it.
      skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: str | Sequence[str] | None = ()
    skip_special_tokens: bool = True

    def __post_init__(self):
        for name in ("stop", "bad_words"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, (value,))
            if not all(isinstance(s, str) and s for s in self._make_tuple(name)):
                raise ValueError(f"{name}={value!r}: expected non-empty strings")
        self._make_tuple("stop_token_ids")
        self._check_range("temperature", 0, 1e4)
        self._check_range("top_p", 0, 1)
        if self.top_p == 0:
            raise ValueError("top_p=0: must be above 0 (temperature=0 is greedy)")
        self._check_range("min_p", 0, 1)
        self._check_range("presence_penalty", -2, 2)
        self._check_range("frequency_penalty", -2, 2)
        self._check_range("repetition_penalty", 0.01, 100)  # so that no product with a logit overflows
        self._check_integer("n", 1, _MAX_N)
        self._check_integer("top_k", -1, 2**31 - 1)
        self._check_integer("max_tokens", 1, 2**31 - 1)
        self._check_integer("min_tokens", 0, self.max_tokens)
        for name, high in (("seed", 2**32 - 1), ("logprobs", MAX_LOGPROBS), ("prompt_logprobs", MAX_LOGPROBS)):
            if getattr(self, name) is not None:
                self._check_integer(name, 0, high)
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n={self.n}: must be 1 with temperature=0, which gives the same output every time")
        self._check_tokens()

    def _check_tokens(self) -> None:
        if self.allowed_token_ids is not None and not self._make_tuple("allowed_token_ids"):
            raise ValueError("allowed_token_ids=(): give at least one token id, or None for all")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias={self.logit_bias!r}: expected numbers by token id")
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
            for token_id, bias in self.logit_bias.items():
                check_number(f"logit_bias[{token_id!r}]", bias, -100, 100)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return cast(tuple[str, ...], self.stop)  # which the constructor made one

    @property
    def needs_full_sampler(self) -> bool:
        """Whether its tokens take more than temperature, top_k, top_p and min_p."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return (
            penalties != (0, 0, 1)
            or self.logprobs is not None
            or self.min_tokens > 0
            or self.allowed_token_ids is not None
            or bool(self.logit_bias or self.bad_words)
        )

    def _make_tuple(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if not isinstance(value, Iterable | None):
            raise ValueError(f"{name}={value!r}: expected a list")
        object.__setattr__(self, name, () if value is None else tuple(value))
        return getattr(self, name)

    def _check_range(self, name: str, low: float, high: float) -> None:
        check_number(name, getattr(self, name), low, high)

    def _check_integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name}={value!r}: must be an integer in [{low}, {high}]")


def check_number(what: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError for what is no finite number in [low, high]."""
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{what}={value!r}: must be a number in [{low:g}, {high:g}]")
