"""Every sampling parameter through the whole engine, against NumPy on the logits of a plain forward pass."""

import pathlib
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.attention import causal_attention
from jaxinfer.outputs import Logprob, RequestOutput
from tests import sampling_reference as reference
from tests import tiny_model

LENGTH = 96  # of the sequences whose logits are looked at
VOCAB = tiny_model.CONFIG["vocab_size"]
PROMPT = [17, 200, 3, 3, 90, 41, 5]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)

Logits = Callable[[list[int]], np.ndarray]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def engine(model_dir: pathlib.Path):
    with Engine(
        str(model_dir), max_num_seqs=4, max_num_batched_tokens=32, max_model_len=LENGTH, page_size=4, decode_steps=4
    ) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(engine: Engine):
    yield
    engine._core.scheduler.check()
    assert not engine.has_unfinished_requests
    assert all(a.num_free == a.num_usable_pages for a in engine._core.scheduler.allocators)


@pytest.fixture(scope="module")
def logits_of(engine: Engine) -> Logits:
    """float32 [T, V] after each of T tokens: no cache, no pages, no batch."""
    definition, weights = engine.resolved.definition, engine._core.runner._weights
    scale = definition.config.softmax_scale

    @jax.jit
    def forward(weights: tuple[jax.Array, ...], tokens: jax.Array) -> jax.Array:
        model = definition.bind(weights)
        attend = lambda layer, q, k, v: causal_attention(q, k, v, scale)  # noqa: E731
        return model.logits(model(tokens, jnp.arange(LENGTH)[None], attend))[0]

    def logits(tokens: list[int]) -> np.ndarray:
        padded = np.array([tokens + [0] * (LENGTH - len(tokens))], np.int32)
        return np.asarray(forward(weights, padded))[: len(tokens)]

    return logits


def expected(engine: Engine, logits_of: Logits, prompt: list[int], params: SamplingParams) -> list[int]:
    """The output, token by token."""
    request = engine._intake.make_requests(prompt, params)[0]
    output: list[int] = []
    while len(output) < params.max_tokens and (not output or output[-1] not in request.stop_token_ids):
        logits = logits_of(prompt + output)[-1]
        logits = reference.process(logits, params, prompt, output, request.stop_token_ids, request.bad_words)
        output.append(reference.draw(logits, params, request.seed, len(prompt) + len(output)))
    return output


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def some(rng: random.Random, value: Any, neutral: Any) -> Any:
    return value if rng.random() < 0.4 else neutral


def random_params(rng: random.Random, seed: int) -> SamplingParams:
    """Each parameter is used by four requests of ten."""
    words = ["".join(rng.choices("abc", k=rng.randint(1, 2))) for _ in range(40)]
    min_tokens = some(rng, rng.randint(1, 10), 0)
    return SamplingParams(
        temperature=some(rng, 0.0, rng.choice([0.5, 1.0, 3.0])),
        top_k=some(rng, rng.randint(1, 30), 0),
        top_p=some(rng, rng.uniform(0.3, 0.95), 1.0),
        min_p=some(rng, rng.uniform(0.001, 0.2), 0.0),
        presence_penalty=some(rng, rng.uniform(-2, 2), 0.0),
        frequency_penalty=some(rng, rng.uniform(-2, 2), 0.0),
        repetition_penalty=some(rng, rng.uniform(0.7, 1.5), 1.0),
        seed=seed,
        max_tokens=max(min_tokens, rng.randint(1, 16)),
        min_tokens=min_tokens,
        stop_token_ids=some(rng, rng.sample(range(VOCAB), 15), ()),
        logit_bias=some(rng, {rng.randrange(VOCAB): rng.uniform(-20, 20) for _ in range(20)}, None),
        allowed_token_ids=some(rng, rng.sample(range(VOCAB), 120), None),
        bad_words=some(rng, words, ()),
        logprobs=some(rng, rng.randint(0, 20), None),
        prompt_logprobs=some(rng, rng.randint(0, 20), None),
    )


def random_load(num_requests: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(num_requests)]
    return prompts, [random_params(rng, seed) for seed in range(num_requests)]


def test_random_parameters_match_the_reference(engine: Engine, logits_of: Logits):
    """Forty requests in four slots; prompts longer than a chunk; all parameters at once."""
    prompts, each = random_load(40)
    together = engine.generate(prompts, each)
    for i, (output, prompt, params) in enumerate(zip(together, prompts, each, strict=True)):
        assert tokens(output) == expected(engine, logits_of, prompt, params), (i, params)
        check_logprobs(output, logits_of, params)


def check_logprobs(output: RequestOutput, logits_of: Logits, params: SamplingParams) -> None:
    """All that a request asked for, against the raw logits."""
    prompt, completion = output.prompt_token_ids, output.outputs[0]
    logprobs = reference.log_softmax(logits_of(prompt + completion.token_ids))
    if params.logprobs is None:
        assert completion.logprobs is None and completion.cumulative_logprob is None
    else:
        assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
        for i, (token_id, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            check_entry(entry, token_id, logprobs[len(prompt) + i - 1], params.logprobs)
        own = [entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
        np.testing.assert_allclose(completion.cumulative_logprob, sum(own), rtol=1e-6)
    if params.prompt_logprobs is None:
        assert output.prompt_logprobs is None
    else:
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for i, entry in enumerate(output.prompt_logprobs[1:], start=1):
            assert entry is not None
            check_entry(entry, prompt[i], logprobs[i - 1], params.prompt_logprobs)


def check_entry(entry: dict[int, Logprob], token_id: int, logprobs: np.ndarray, num_top: int) -> None:
    top = np.argsort(-logprobs, kind="stable")[:num_top].tolist()
    assert set(entry) == {token_id, *top} and next(iter(entry)) == token_id
    for found_id, found in entry.items():
        np.testing.assert_allclose(found.logprob, logprobs[found_id], rtol=1e-4, atol=1e-4)
        rank = top.index(found_id) + 1 if found_id in top else 1 + np.sum(logprobs > logprobs[found_id])
        assert found.rank == rank
