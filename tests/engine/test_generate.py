"""The engine end to end on a tiny random model: same tokens whatever shares the batch, nothing compiled late."""

import pathlib
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.progress import Progress
from tests import tiny_model
from tests.engine.prompts import GREEDY, prompts, solo


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
    sizes = {"max_num_seqs": 2, "max_model_len": 200, "max_num_batched_tokens": 100, "decode_steps": 1, "page_size": 8}
    with Engine(str(model_dir), **sizes) as other:
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


def test_max_tokens_is_cut_to_what_max_model_len_leaves(engine: Engine):
    output = engine.generate([5] * 250, SamplingParams(temperature=0.0, max_tokens=99, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"


def test_thousand_random_requests_compile_nothing(engine: Engine):
    """By the engine's own count; the twin below shows that it counts."""
    before = engine.metrics()
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
    after = engine.metrics()
    assert after.num_compilations_after_ready == before.num_compilations_after_ready
    assert after.e2e_s.count - before.e2e_s.count == 1000
    assert after.generation_tokens - before.generation_tokens == sum(len(o.outputs[0].token_ids) for o in outputs)
    jax.jit(lambda x: x * 3 + len(lengths))(np.arange(3.0, dtype=np.float32))
    assert engine.metrics().num_compilations_after_ready > before.num_compilations_after_ready


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_dtype_runs_in_batches(model_dir: pathlib.Path, dtype: str):
    """bfloat16 attention over several sequences once was a product that XLA:CPU does not have."""
    with Engine(str(model_dir), dtype=dtype, max_num_seqs=2, max_model_len=64, max_num_batched_tokens=32) as engine:
        outputs = engine.generate([[1, 2, 3], [4, 5]], GREEDY)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length"] * 2


def test_a_model_without_a_tokenizer_runs_on_token_ids(tmp_path: pathlib.Path):
    bare = tiny_model.make(tmp_path / "bare", with_tokenizer=False)
    with Engine(str(bare), **tiny_model.ONE_SLOT) as engine:
        output = engine.generate([1, 2, 3], GREEDY)[0].outputs[0]
        assert len(output.token_ids) == 20 and output.text == ""
        with pytest.raises(ValueError, match="the model has no tokenizer, so prompts must be token ids"):
            engine.generate("abc", GREEDY)
        with pytest.raises(ValueError, match="stop strings need a tokenizer"):
            engine.generate([1], replace(GREEDY, stop="x"))
        with pytest.raises(ValueError, match="no tokenizer, so no chat template"):
            engine.chat([{"role": "user", "content": "hello"}])


def test_generate_shows_its_progress(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    engine.generate(prompts(6), GREEDY)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(engine, "progress", Progress(enabled=True))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    engine.generate(prompts(6), GREEDY)
    told = capsys.readouterr().err
    assert "\rgenerating: 0 of 6 requests, " in told and "\ngenerating: 6 requests in " in told.replace("\033[K", "\n")


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
    with Engine(str(plain), **tiny_model.SIZES) as engine:
        free = solo(engine, [1, 2, 3], GREEDY)
        position = next(i for i, token in enumerate(free) if i > 2 and token not in free[:i])
        candidates = ((p, solo(engine, p, GREEDY)) for p in prompts(20, longest=20, seed=5))
        neighbour, expected = next((p, tokens) for p, tokens in candidates if free[position] not in p + tokens)
    poisoned = tiny_model.make(tmp_path / "bad", tie_word_embeddings=False, poisoned_token=free[position])
    with Engine(str(poisoned), **tiny_model.SIZES) as engine:
        bad, good = (o.outputs[0] for o in engine.generate([[1, 2, 3], neighbour], GREEDY))
    assert bad.finish_reason == "error" and bad.token_ids == free[: position + 1]
    assert good.finish_reason == "length" and good.token_ids == expected


def test_a_row_that_is_not_finite_ends_alone(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    """Token 200's embedding is NaN: the request that holds it ends with an error, its neighbours are unchanged,
    and a request that gets its pages afterwards is too."""
    poisoned = tiny_model.make(tmp_path / "poisoned", tie_word_embeddings=False, poisoned_token=200)
    good = [p for p in prompts(6, longest=40) if 200 not in p]
    with Engine(str(poisoned), **tiny_model.SIZES) as engine:
        expected = [solo(engine, prompt, GREEDY) for prompt in good]
        mixed = engine.generate([[7, 200, 9], *good, [200] * 30, *good], GREEDY)
        assert [o.outputs[0].finish_reason for o in mixed].count("error") == 2
        assert mixed[0].outputs[0].finish_reason == "error" and mixed[0].outputs[0].token_ids == []
        assert [o.outputs[0].token_ids for o in mixed[1 : len(good) + 1]] == expected
        assert [o.outputs[0].token_ids for o in mixed[len(good) + 2 :]] == expected
        engine._core.scheduler.check()
