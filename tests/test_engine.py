"""The engine end to end on a tiny random model: same tokens whatever shares the batch, nothing compiled late."""

import pathlib
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.batch import StepShape
from tests import tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def engine(model_dir: pathlib.Path):
    with Engine(str(model_dir), max_num_seqs=4, max_num_batched_tokens=64, decode_steps=4) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(engine: Engine):
    """After each test the shared engine is empty and its pages are all back."""
    yield
    engine._core.scheduler.check()
    assert not engine.has_unfinished_requests
    assert all(a.num_free == a.num_usable_pages for a in engine._core.scheduler.allocators)


def prompts(count: int, longest: int = 150, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest)).tolist() for _ in range(count)]


def solo(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    return engine.generate(prompt, params)[0].outputs[0].token_ids


def test_outputs_equal_solo_decoding(engine: Engine):
    """Ten prompts of mixed lengths in four slots, prefilled in chunks, against one at a time. Greedy rows, rows that
    draw and rows that truncate are neighbours."""
    each = [
        SamplingParams(
            temperature=[0.0, 1.0, 0.7][i % 3],
            top_k=[0, 5][i % 2],
            top_p=[1.0, 0.9, 0.5, 1.0][i % 4],
            min_p=[0.0, 0.0, 0.02][i % 3],
            seed=i,
            max_tokens=5 + 3 * i,
        )
        for i in range(10)
    ]
    together = engine.generate(prompts(10), each)
    assert [len(o.prompt_token_ids) for o in together] == [len(p) for p in prompts(10)]
    for output, prompt, params in zip(together, prompts(10), each, strict=True):
        assert output.outputs[0].token_ids == solo(engine, prompt, params)
        assert output.outputs[0].finish_reason in ("length", "stop")


def test_steps_per_dispatch_and_chunk_length_change_no_token(engine: Engine, model_dir: pathlib.Path):
    """With a stop string in the midst of a dispatch, too: tokens after it once came out."""
    free = [o.outputs[0] for o in engine.generate(prompts(3), GREEDY)]
    stopping = replace(GREEDY, stop=free[1].text[3:5])
    stopped = engine.generate(prompts(3)[1], stopping)[0].outputs[0]
    assert stopped.finish_reason == "stop" and 0 < len(stopped.token_ids) < len(free[1].token_ids)
    with Engine(str(model_dir), max_num_seqs=3, max_num_batched_tokens=200, decode_steps=1, page_size=8) as other:
        assert [o.outputs[0] for o in other.generate(prompts(3), GREEDY)] == free
        assert other.generate(prompts(3)[1], stopping)[0].outputs[0] == stopped


def test_a_stop_token_ends_the_output_and_is_its_last_token(engine: Engine):
    free = solo(engine, prompts(1)[0], GREEDY)
    stop = next(t for i, t in enumerate(free) if t not in free[:i] and i > 4)
    params = SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=(stop,))
    output = engine.generate(prompts(1)[0], params)[0].outputs[0]
    assert output.token_ids == free[: free.index(stop) + 1]
    assert output.finish_reason == "stop"


def test_a_stop_string_ends_the_text_before_itself(engine: Engine):
    full = engine.generate("Once upon", GREEDY)[0].outputs[0].text
    stop = full[3:6]
    output = engine.generate("Once upon", SamplingParams(temperature=0.0, max_tokens=20, stop=stop))[0].outputs[0]
    assert output.text == full[: full.index(stop)]
    assert output.finish_reason == "stop"


def test_a_stream_adds_up_to_the_text(engine: Engine):
    whole = engine.generate("Once upon", GREEDY)[0].outputs[0]
    deltas = list(engine.stream("Once upon", GREEDY))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == whole.token_ids
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == whole.finish_reason


def test_leaving_a_stream_early_frees_its_pages(engine: Engine):
    for _ in engine.stream("Once upon", GREEDY):
        break  # `nothing_leaks` looks at the pool


def test_a_stream_refuses_and_queues_at_the_call(engine: Engine):
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.stream("", GREEDY)
    stream = engine.stream("abc", GREEDY)
    assert engine.has_unfinished_requests
    del stream  # never started; `nothing_leaks` looks at the pool


def test_an_aborted_stream_ends(engine: Engine):
    stream = engine.stream("abc", GREEDY)
    next(stream)
    (request_id,) = engine._unfinished
    engine.abort(request_id)
    assert [delta.finish_reason for delta in stream] == ["abort"]


def test_requests_added_by_hand_come_out_of_step_even_if_generate_ran_meanwhile(engine: Engine):
    engine.add_request("abc", GREEDY)
    engine.generate("something else", GREEDY)
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    assert outputs[-1].prompt == "abc"
    assert outputs[-1].outputs[0].token_ids == solo(engine, outputs[-1].prompt_token_ids, GREEDY)


def test_streams_and_generate_may_interleave(engine: Engine):
    """Each once took the other's outputs away, and the other then waited for ever."""
    expected = [engine.generate(text, GREEDY)[0].outputs[0].text for text in ("one", "two", "three")]
    first, second = engine.stream("one", GREEDY), engine.stream("two", GREEDY)
    texts = [next(first).text, next(second).text]
    third = engine.generate("three", GREEDY)[0].outputs[0].text
    texts[1] += "".join(delta.text for delta in second)
    texts[0] += "".join(delta.text for delta in first)
    assert [*texts, third] == expected


def test_abort_ends_waiting_and_running_requests(engine: Engine):
    ids = [engine.add_request([1, 2, 3], GREEDY) for _ in range(6)]  # four slots: two wait
    engine.step()
    for request_id in [*ids, "unknown"]:
        engine.abort(request_id)
        engine.abort(request_id)


def test_a_step_that_fails_ends_what_ran_and_nothing_else(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """The failed step has taken the donated cache with it. Requests in the queue still get their tokens."""
    expected = solo(engine, [1, 2, 3], GREEDY)
    ids = [engine.add_request([1, 2, 3], GREEDY) for _ in range(6)]  # four slots: two wait
    dispatch = engine._core.runner.dispatch

    def fail_on_decode(shape, *of_step):
        output = dispatch(shape, *of_step)
        if shape.chunk_tokens == 0:
            monkeypatch.undo()
            for array in jax.tree.leaves(engine._core.runner._cache):
                array.delete()
            raise RuntimeError("planted")
        return output

    monkeypatch.setattr(engine._core.runner, "dispatch", fail_on_decode)
    outputs = engine.step() + engine.step() + engine.step() + engine.step()  # a prompt each
    with pytest.raises(RuntimeError, match="planted"):
        engine.step()
    while engine.has_unfinished_requests:
        outputs += engine.step()
    final = {output.request_id: output.outputs[0] for output in outputs if output.finished}
    assert [final[i].finish_reason for i in ids] == ["error"] * 4 + ["length"] * 2
    assert [final[i].token_ids for i in ids[4:]] == [expected] * 2


def test_a_closed_engine_says_so(model_dir: pathlib.Path):
    with Engine(str(model_dir), max_num_seqs=1, max_model_len=32) as closed:
        stream = closed.stream([1, 2], GREEDY)
        next(stream)
    closed.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        closed.generate([1, 2], GREEDY)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        next(stream)


def test_max_tokens_is_cut_to_what_max_model_len_leaves(engine: Engine):
    output = engine.generate([5] * 250, SamplingParams(temperature=0.0, max_tokens=99, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"


def test_thousand_random_requests_compile_nothing(engine: Engine):
    """Counted through JAX's own monitoring events; the twin below shows that the counter counts."""
    compilations = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(0.04, 1000), 240)
    each = [
        SamplingParams(
            temperature=float(rng.choice([0.0, 0.8])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.9])),
            max_tokens=int(rng.integers(1, 12)),
        )
        for _ in lengths
    ]
    outputs = engine.generate([rng.integers(0, 256, n).tolist() for n in lengths], each)
    assert len(outputs) == 1000 and all(o.finished for o in outputs)
    assert compilations == []
    jax.jit(lambda x: x * 3 + len(lengths))(np.arange(3.0, dtype=np.float32))
    assert compilations


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", GREEDY, "the prompt is empty"),
        ([], GREEDY, "the prompt is empty"),
        ([5] * 256, GREEDY, "prompt of 256 tokens leaves no room to generate within --max_model_len=256"),
        ([1, 264], GREEDY, r"264 is not a token id of the model; ids are integers in \[0, 264\)"),
        ([1, -1], GREEDY, "-1 is not a token id"),
        ([2**63], GREEDY, "is not a token id"),
        ([1.5], GREEDY, "1.5 is not a token id"),
        ([True], GREEDY, "True is not a token id"),
        (None, GREEDY, "None is neither a text nor token ids"),
        ("a", SamplingParams(stop_token_ids=(999,)), "999 is not a token id"),
        ("a", SamplingParams(stop_token_ids=tuple(range(17))), "18 stop token ids, the model's 1 included; at most 16"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(engine: Engine, prompt, params: SamplingParams, message: str):
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt], params)
    with pytest.raises(ValueError, match="prompt 1: "):
        engine.generate(["fine", prompt], params if params.stop_token_ids == () else [GREEDY, params])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -2}, "top_k=-2"),
        ({"max_tokens": 0}, r"max_tokens=0: must be an integer in \[1, "),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"stop": ("",)}, "non-empty strings"),
    ],
)
def test_sampling_params_out_of_range(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_unknown_names_raise_with_the_closest_known_one():
    with pytest.raises(TypeError, match="has no field 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=0.5)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="has no field 'max_model_length'; did you mean 'max_model_len'"):
        Engine("anywhere", max_model_length=5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_dtype_runs_in_batches(model_dir: pathlib.Path, dtype: str):
    """bfloat16 attention over several sequences once was a product that XLA:CPU does not have."""
    with Engine(str(model_dir), dtype=dtype, max_num_seqs=2, max_model_len=64) as engine:
        outputs = engine.generate([[1, 2, 3], [4, 5]], GREEDY)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length"] * 2


def test_a_model_without_a_tokenizer_runs_on_token_ids(tmp_path: pathlib.Path):
    bare = tiny_model.make(tmp_path / "bare", with_tokenizer=False)
    with Engine(str(bare), max_num_seqs=1, max_model_len=32) as engine:
        output = engine.generate([1, 2, 3], GREEDY)[0].outputs[0]
        assert len(output.token_ids) == 20 and output.text == ""
        with pytest.raises(ValueError, match="the model has no tokenizer, so prompts must be token ids"):
            engine.generate("abc", GREEDY)
        with pytest.raises(ValueError, match="stop strings need a tokenizer"):
            engine.generate([1], replace(GREEDY, stop="x"))
        with pytest.raises(ValueError, match="no tokenizer, so no chat template"):
            engine.chat([{"role": "user", "content": "hello"}])


def test_as_many_params_as_prompts_or_one(engine: Engine):
    with pytest.raises(ValueError, match="2 prompts but 3 sampling params"):
        engine.generate([[1], [2]], [GREEDY] * 3)


def test_a_shape_that_was_not_compiled_is_an_error(engine: Engine):
    with pytest.raises(RuntimeError, match=r"StepShape\(chunk_tokens=5, .*\) is not a compiled shape"):
        engine._core.runner.dispatch(StepShape(5, 4, 8, 1), None)  # pyright: ignore[reportArgumentType]


def test_prompts_may_be_numpy_and_generators(engine: Engine):
    expected = [engine.generate(text, GREEDY)[0].outputs[0] for text in ("abc", "xyz")]
    assert [o.outputs[0] for o in engine.generate((text for text in ("abc", "xyz")), GREEDY)] == expected
    ids = np.array(engine.generate("abc", GREEDY)[0].prompt_token_ids)
    assert engine.generate(ids, GREEDY)[0].outputs[0].token_ids == expected[0].token_ids
    with pytest.raises(ValueError, match="prompts: expected texts or token ids, found 5"):
        engine.generate(5, GREEDY)  # pyright: ignore[reportArgumentType]


def test_a_row_that_turns_not_finite_while_it_decodes_ends_alone(tmp_path: pathlib.Path):
    """The embedding of a token that greedy decoding generates is NaN: what came before it stays."""
    plain = tiny_model.make(tmp_path / "plain", tie_word_embeddings=False)
    with Engine(str(plain), max_num_seqs=2, max_model_len=64) as engine:
        free = solo(engine, [1, 2, 3], GREEDY)
        position = next(i for i, token in enumerate(free) if i > 2 and token not in free[:i])
        candidates = ((p, solo(engine, p, GREEDY)) for p in prompts(20, longest=20, seed=5))
        neighbour, expected = next((p, tokens) for p, tokens in candidates if free[position] not in p + tokens)
    poisoned = tiny_model.make(tmp_path / "bad", tie_word_embeddings=False, poisoned_token=free[position])
    with Engine(str(poisoned), max_num_seqs=2, max_model_len=64) as engine:
        bad, good = (o.outputs[0] for o in engine.generate([[1, 2, 3], neighbour], GREEDY))
    assert bad.finish_reason == "error" and bad.token_ids == free[: position + 1]
    assert good.finish_reason == "length" and good.token_ids == expected


def test_a_row_that_is_not_finite_ends_alone(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    """Token 200's embedding is NaN: the request that holds it ends with an error, its neighbours are unchanged,
    and a request that gets its pages afterwards is too."""
    poisoned = tiny_model.make(tmp_path / "poisoned", tie_word_embeddings=False, poisoned_token=200)
    good = [p for p in prompts(6, longest=40) if 200 not in p]
    with Engine(str(poisoned), max_num_seqs=3) as engine:
        expected = [solo(engine, prompt, GREEDY) for prompt in good]
        mixed = engine.generate([[7, 200, 9], *good, [200] * 30, *good], GREEDY)
        assert [o.outputs[0].finish_reason for o in mixed].count("error") == 2
        assert mixed[0].outputs[0].finish_reason == "error" and mixed[0].outputs[0].token_ids == []
        assert [o.outputs[0].token_ids for o in mixed[1 : len(good) + 1]] == expected
        assert [o.outputs[0].token_ids for o in mixed[len(good) + 2 :]] == expected
        engine._core.scheduler.check()
