"""Every sampling parameter through the whole engine, against NumPy on the logits of a plain forward pass."""

import dataclasses
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

LENGTH = tiny_model.SIZES["max_model_len"]  # of the sequences whose logits are looked at
VOCAB = tiny_model.CONFIG["vocab_size"]
PROMPT = [17, 200, 3, 3, 90, 41, 5]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)

Logits = Callable[[list[int]], np.ndarray]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def engine(model_dir: pathlib.Path):
    with Engine(str(model_dir), **tiny_model.SIZES) as engine:
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
        attend = lambda slot, q, k, v, sinks=None: causal_attention(q, k, v, scale)  # noqa: E731
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
        assert completion.cumulative_logprob == sum(own)
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


@pytest.mark.parametrize(
    "change",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 1.5},
        {"logit_bias": {9: 100.0}},
        {"logit_bias": {9: -100, 3: 40}},
        {"allowed_token_ids": (7, 8, 263)},
        {"min_tokens": 9},
        {"bad_words": (";",)},
    ],
    ids=str,
)
def test_each_parameter_alone_changes_the_output(engine: Engine, logits_of: Logits, change: dict[str, Any]):
    """As the reference says. Alone the model begins with ";", token 26, and soon comes to token 115."""
    stop = (115,) if "min_tokens" in change else ()
    plain = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=stop)
    params = dataclasses.replace(plain, **change)
    output = tokens(engine.generate(PROMPT, params)[0])
    assert output == expected(engine, logits_of, PROMPT, params)
    assert output != tokens(engine.generate(PROMPT, plain)[0])


def test_logprobs_change_no_token_and_agree_with_themselves(engine: Engine):
    """A token's own value and its value among the likeliest must be one float, also across prompt and output."""
    plain = SamplingParams(seed=3, max_tokens=12)
    output = engine.generate(PROMPT, dataclasses.replace(plain, logprobs=20, prompt_logprobs=0))[0]
    assert tokens(output) == tokens(engine.generate(PROMPT, plain)[0])
    greedy = engine.generate(PROMPT, dataclasses.replace(GREEDY, logprobs=5))[0].outputs[0]
    for token_id, entry in zip(greedy.token_ids, greedy.logprobs or [], strict=True):
        assert entry[token_id].logprob == max(e.logprob for e in entry.values()) and entry[token_id].rank == 1
    assert next(iter((greedy.logprobs or [])[0].values())).decoded_token is not None


def test_a_shared_prefix_is_run_again_for_prompt_logprobs_and_only_then(engine: Engine):
    prompt = [*range(40)]
    first = engine.generate(prompt, dataclasses.replace(GREEDY, prompt_logprobs=1))[0]
    before = engine.stats.prefill_tokens
    again = engine.generate(prompt, dataclasses.replace(GREEDY, prompt_logprobs=1))[0]
    assert engine.stats.prefill_tokens - before == 40 and again.prompt_logprobs == first.prompt_logprobs
    assert tokens(engine.generate(prompt, GREEDY)[0]) == tokens(first)
    assert engine.stats.prefill_tokens - before == 44  # 36 were cached
    assert engine.generate([5], dataclasses.replace(GREEDY, prompt_logprobs=1))[0].prompt_logprobs == [None]


def text_of(engine: Engine, params: SamplingParams) -> tuple[str, str | None]:
    output = engine.generate("Once upon", params)[0].outputs[0]
    return output.text, output.finish_reason


def test_what_ended_the_text_may_be_part_of_it(engine: Engine):
    free = engine.generate("Once upon", GREEDY)[0].outputs[0]
    stop = free.text[3:5]
    ended = dataclasses.replace(GREEDY, stop=stop, include_stop_str_in_output=True)
    assert text_of(engine, ended) == (free.text[: free.text.index(stop) + 2], "stop")
    token = free.token_ids[4]
    by_token = dataclasses.replace(GREEDY, stop_token_ids=(token,))
    without, _ = text_of(engine, by_token)
    output = engine.generate("Once upon", dataclasses.replace(by_token, include_stop_str_in_output=True))[0].outputs[0]
    decode = engine.resolved.tokenizer.decode  # pyright: ignore[reportOptionalMemberAccess]
    assert without == decode(output.token_ids[:-1]) and output.text == decode(output.token_ids)


def test_stop_strings_wait_for_min_tokens(engine: Engine):
    """Byte tokens: a character each. A string that ends in the last token that is too early does not stop."""
    params = dataclasses.replace(GREEDY, allowed_token_ids=(64, 65), logit_bias={64: 100})  # "a" all the way
    assert text_of(engine, dataclasses.replace(params, stop="aa")) == ("", "stop")
    assert text_of(engine, dataclasses.replace(params, stop="aa", min_tokens=5)) == ("aaaa", "stop")
    assert text_of(engine, dataclasses.replace(params, stop="ab", min_tokens=5)) == ("a" * 12, "length")


def test_outputs_of_one_prompt(engine: Engine):
    """Each is what its seed draws alone; the prompt is run once and, for the others, but for its last page."""
    prompt = [*range(100, 140)]
    params = SamplingParams(n=6, seed=7, max_tokens=9, logprobs=0)
    before = engine.stats.prefill_tokens
    output = engine.generate([prompt, [250] * 7], [params, GREEDY])[0]
    assert engine.stats.prefill_tokens - before == 40 + 5 * 4 + 7
    assert [completion.index for completion in output.outputs] == [*range(6)] and output.finished
    alone = [
        engine.generate(prompt, SamplingParams(seed=7 + i, max_tokens=9, logprobs=0))[0].outputs[0] for i in range(6)
    ]
    assert [c.token_ids for c in output.outputs] == [c.token_ids for c in alone]
    assert len({tuple(c.token_ids) for c in alone}) == 6
    unseeded = engine.generate(prompt, SamplingParams(n=6, max_tokens=9))[0]
    assert len({tuple(c.token_ids) for c in unseeded.outputs}) == 6


def test_a_stream_of_several_outputs(engine: Engine):
    params = SamplingParams(n=3, seed=5, max_tokens=7, logprobs=1)
    whole = engine.generate("abc", params)[0].outputs
    deltas = [*engine.stream("abc", params)]
    for completion in whole:
        own = [delta for delta in deltas if delta.index == completion.index]
        assert "".join(delta.text for delta in own) == completion.text
        assert [token for delta in own for token in delta.token_ids] == completion.token_ids
        assert sum(len(delta.logprobs or ()) for delta in own) == len(completion.token_ids)
        assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + [completion.finish_reason]


def test_an_abort_ends_all_outputs_of_the_prompt(engine: Engine):
    request_id = engine.add_request("abc", SamplingParams(n=6, max_tokens=50))  # four slots: two wait
    while not (outputs := engine.step()):
        pass
    assert [output.request_id for output in outputs] == [request_id] and len(outputs[0].outputs) == 6
    engine.abort(request_id)  # `nothing_leaks` looks at the rest
    assert engine._core.scheduler.num_running == 0


def test_a_row_that_runs_out_of_tokens_ends_with_an_error_alone(engine: Engine):
    """Only "a" is allowed, and "aa" is a bad word: once token 0 came out, which was not allowed."""
    stuck = dataclasses.replace(GREEDY, allowed_token_ids=(64,), bad_words=("aa",))
    outputs = engine.generate([PROMPT] * 3, [GREEDY, stuck, GREEDY])
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    assert tokens(outputs[1]) == [64] and tokens(outputs[0]) == tokens(outputs[2]) == tokens(
        engine.generate(PROMPT, GREEDY)[0]
    )


def test_a_slot_forgets_who_had_it(engine: Engine):
    """Plain requests beside those with extras, in slots that others have left their parameters in."""
    plain = SamplingParams(seed=1, max_tokens=12)
    wanted = tokens(engine.generate(PROMPT, plain)[0])
    biased = dataclasses.replace(plain, logit_bias={9: 100.0})
    engine.generate([PROMPT] * 4, biased)
    mixed = engine.generate([PROMPT] * 8, [plain, biased] * 4)
    assert [tokens(output) for output in mixed] == [wanted, [9] * 12] * 4


def test_extras_survive_a_failed_step(engine: Engine, monkeypatch: pytest.MonkeyPatch, logits_of: Logits):
    """The donated parameters of the slots go with it."""
    params = dataclasses.replace(GREEDY, frequency_penalty=2.0)
    run, sampler = engine._core.runner._sampler.run, engine._core.runner._sampler

    def fail(*args):
        monkeypatch.undo()
        run(*args)
        for array in jax.tree.leaves(sampler._params):
            array.delete()
        raise RuntimeError("planted")

    monkeypatch.setattr(sampler, "run", fail)
    with pytest.raises(RuntimeError, match="planted"):
        engine.generate(PROMPT, params)
    assert tokens(engine.generate(PROMPT, params)[0]) == expected(engine, logits_of, PROMPT, params)


def test_extras_compile_nothing_after_the_start(engine: Engine):
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    engine.generate(*random_load(40))
    engine.beam_search(PROMPT, beam_width=2, max_tokens=3)
    assert compilations == []


def test_without_extras_no_program_for_them_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine._core.runner._sampler, "run", None)
    engine.generate([PROMPT] * 6, SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, max_tokens=9))


def test_rows_with_extras_take_single_steps_and_others_many(engine: Engine):
    def steps(params: SamplingParams) -> int:
        before = engine.stats.steps
        engine.generate(PROMPT, params)
        return engine.stats.steps - before

    assert steps(dataclasses.replace(GREEDY, max_tokens=13)) == 1 + 12 // 4
    assert steps(dataclasses.replace(GREEDY, max_tokens=13, min_tokens=1)) == 13


def test_a_row_that_a_stop_token_ended_rests_on_the_devices(engine: Engine):
    """In the step that is under way when the host learns of it; the host drops whatever that gives."""
    first = tokens(engine.generate(PROMPT, GREEDY)[0])[0]
    output = engine.generate(PROMPT, dataclasses.replace(GREEDY, stop_token_ids=(first,), logprobs=0))[0]
    assert tokens(output) == [first]
    last_freed = engine._core.scheduler.shards[0]._free_slots[-1]
    assert np.asarray(engine._core.runner._slots.stopped)[0, last_freed]


def test_the_memory_plan_counts_what_lies_on_the_devices(engine: Engine):
    arrays = jax.tree.leaves(engine._core.runner._sampler._params)
    assert sum(array.nbytes for array in arrays) == engine._core.runner.extras_spec.slots_bytes


def test_an_only_slot_has_extras_too(model_dir: pathlib.Path, engine: Engine):
    prompts, each = random_load(12)
    wanted = [tokens(output) for output in engine.generate(prompts, each)]
    with Engine(str(model_dir), max_num_seqs=1, max_model_len=LENGTH, decode_steps=4) as alone:
        assert [tokens(output) for output in alone.generate(prompts, each)] == wanted
