"""Logits processors against plain Python in float64, token by token, and what must never happen."""

import collections
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.logits_processors import ProcessorArrays, process
from jaxinfer.sampling import SamplingArrays, sample

VOCAB, ROWS, LENGTH, STOPS, WORDS, WORD_LEN = 7, 6, 12, 3, 4, 3
INT32 = np.iinfo(np.int32)

process_jit = jax.jit(process)


def neutral(rows: int = ROWS) -> ProcessorArrays:
    return ProcessorArrays(
        presence_penalty=np.zeros(rows, np.float32),
        frequency_penalty=np.zeros(rows, np.float32),
        repetition_penalty=np.ones(rows, np.float32),
        prompt_len=np.full(rows, 2, np.int32),
        min_len=np.zeros(rows, np.int32),
        stop_token_ids=np.full((rows, STOPS), -1, np.int32),
        bad_words=np.full((rows, WORDS, WORD_LEN), -1, np.int32),
    )


def pad_word(*tokens: int) -> list[int]:
    return [-1] * (WORD_LEN - len(tokens)) + list(tokens)


def random_case(rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of `process`. Every feature is off in some rows; few ids, so that words and repeats are common."""

    def some(value: np.ndarray, off: float) -> np.ndarray:
        chosen = rng.random(ROWS).reshape(-1, *[1] * (value.ndim - 1)) < 0.6
        return np.where(chosen, value, off).astype(value.dtype)

    f32, i32 = np.float32, np.int32
    words = [[pad_word(*rng.integers(0, VOCAB, n)) for n in rng.integers(0, 4, WORDS)] for _ in range(ROWS)]
    prompt_len = rng.integers(1, 8, ROWS).astype(i32)
    num_tokens = (prompt_len + rng.integers(0, LENGTH - 7, ROWS)).astype(i32)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH))
    garbage = rng.integers(INT32.min, INT32.max, (ROWS, LENGTH))
    garbage = np.where(rng.random((ROWS, LENGTH)) < 0.5, garbage, rng.integers(-1, VOCAB, (ROWS, LENGTH)))
    bias = np.where(rng.random((ROWS, VOCAB)) < 0.2, -np.inf, rng.normal(0, 2, (ROWS, VOCAB)))
    bias = np.where(rng.random((ROWS, 1)) < 0.03, -np.inf, bias)
    arrays = ProcessorArrays(
        presence_penalty=some(rng.uniform(-2, 2, ROWS).astype(f32), 0),
        frequency_penalty=some(rng.uniform(-2, 2, ROWS).astype(f32), 0),
        repetition_penalty=some(rng.uniform(0.5, 2, ROWS).astype(f32), 1),
        prompt_len=prompt_len,
        min_len=some(rng.integers(0, LENGTH, ROWS).astype(i32), 0),
        stop_token_ids=rng.integers(-1, VOCAB, (ROWS, STOPS)).astype(i32),
        bad_words=some(np.array(words, i32), -1),
    )
    return {
        "logits": rng.normal(0, 3, (ROWS, VOCAB)).astype(f32),
        "arrays": arrays,
        "history": np.where(np.arange(LENGTH) < num_tokens[:, None], tokens, garbage).astype(i32),
        "bias": some(bias.astype(f32), 0),
        "num_tokens": num_tokens,
    }


def reference(logits, arrays: ProcessorArrays, history, bias, num_tokens) -> tuple[list[float], int]:
    """One row by the definitions; also how many bad words of two tokens and more were completed."""
    out = [float(x) + float(b) for x, b in zip(logits, bias, strict=True)]
    tokens = history[:num_tokens].tolist()
    output, long_words = tokens[arrays.prompt_len :], 0
    for padded in arrays.bad_words.tolist():
        word = [t for t in padded if t >= 0]
        if word and len(output) >= len(word) - 1 and output[len(output) - len(word) + 1 :] == word[:-1]:
            out[word[-1]] = -math.inf
            long_words += len(word) > 1
    if len(tokens) < arrays.min_len:
        for stop in arrays.stop_token_ids:
            if stop >= 0:
                out[stop] = -math.inf
    for token in set(tokens):
        factor = float(arrays.repetition_penalty)
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token, count in collections.Counter(output).items():
        out[token] -= float(arrays.frequency_penalty) * count + float(arrays.presence_penalty)
    return out, long_words


def run(case: dict[str, Any]) -> np.ndarray:
    return np.asarray(process_jit(**jax.tree.map(jnp.asarray, case)))


def rows_of(case: dict[str, Any], index: Any) -> dict[str, Any]:
    return jax.tree.map(lambda a: a[index], case)


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


def test_random_rows_match_the_reference():
    rng = np.random.default_rng(0)
    completed = masked = 0
    for _ in range(250):
        case = random_case(rng)
        out = run(case)
        for row in range(ROWS):
            wanted, long_words = reference(**rows_of(case, row))
            np.testing.assert_allclose(out[row], wanted, rtol=1e-6, atol=3e-6)
            completed, masked = completed + long_words, masked + np.isneginf(wanted).all()
    assert completed > 100 and masked > 5, (completed, masked)  # the cases are as varied as they claim


def test_a_neutral_row_is_untouched_beside_busy_ones():
    """Bit for bit: -0.0, infinities and NaN too, and the last column, which JAX means by an index of -1."""
    rng = np.random.default_rng(1)
    odd = np.array([-0.0, 0.0, np.inf, -np.inf, np.nan, 1e30, -1.5], np.float32)
    quiet = np.arange(ROWS) % 2 == 0

    def with_quiet_rows(arrays: ProcessorArrays) -> ProcessorArrays:
        return jax.tree.map(lambda n, a: np.where(quiet.reshape(-1, *[1] * (a.ndim - 1)), n, a), neutral(), arrays)

    for _ in range(50):
        case = random_case(rng)
        case["arrays"] = with_quiet_rows(case["arrays"])
        # Too early to stop, but with no stop token there is none to mask.
        case["arrays"] = case["arrays"]._replace(min_len=np.where(quiet, 100, case["arrays"].min_len).astype(np.int32))
        case["bias"][quiet] = 0
        case["logits"][quiet] = rng.permutation(odd)
        assert np.array_equal(bits(run(case))[quiet], bits(case["logits"])[quiet])


def test_a_row_depends_on_nothing_but_itself():
    """Not on its place, its neighbours, or what lies in the history past its last token."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        case = random_case(rng)
        out, order = run(case), rng.permutation(ROWS)
        shuffled = rows_of(case, order)
        past = np.arange(LENGTH) >= shuffled["num_tokens"][:, None]
        garbage = rng.choice([-1, 0, VOCAB - 1, VOCAB, INT32.min, INT32.max], past.shape)
        shuffled["history"] = np.where(past, garbage, shuffled["history"]).astype(np.int32)
        assert np.array_equal(bits(run(shuffled)), bits(out[order]))
        mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), case, random_case(rng))
        assert np.array_equal(bits(run(mixed))[0], bits(out)[0])


@pytest.mark.parametrize(
    ("word", "history", "prompt_len", "banned"),
    [
        ([5], [1, 2], 2, [5]),  # one token is banned from the first on
        ([3, 5], [1, 2, 3], 2, [5]),
        ([3, 5], [1, 2, 3, 4], 2, []),  # no longer the last token
        ([3, 5], [1, 3], 2, []),  # begun by the prompt
        ([4, 3, 5], [4, 3], 1, []),  # begun by prompt and output
        ([4, 3, 5], [1, 4, 3], 1, [5]),
        ([4, 4, 4], [1, 4, 4, 4], 1, [4]),
        ([5, 3], [5], 0, [3]),  # position 0
        ([4, 5, 3], [5], 0, []),  # longer than the row: positions before the start are no match
        ([5, 5, 3], [5], 0, []),  # nor is the first token read twice
        ([], [1, 2], 2, []),
    ],
)
def test_bad_words(word: list[int], history: list[int], prompt_len: int, banned: list[int]):
    arrays = neutral(1)._replace(
        prompt_len=np.array([prompt_len], np.int32),
        bad_words=np.array([[pad_word(), pad_word(*word), pad_word(), pad_word()]], np.int32),
    )
    padded = np.array([history + [3] * (LENGTH - len(history))], np.int32)
    zeros = np.zeros((1, VOCAB), np.float32)
    args = {"arrays": arrays, "history": padded, "bias": zeros, "num_tokens": np.array([len(history)], np.int32)}
    assert np.flatnonzero(np.isneginf(run({"logits": zeros, **args})[0])).tolist() == banned


def test_penalties_by_hand():
    """Prompt [1, 2], output [2, 3, 3], repetition 2, frequency 0.5, presence 0.25."""
    num_tokens = np.array([5], np.int32)
    arrays = neutral(1)._replace(
        repetition_penalty=np.array([2], np.float32),
        frequency_penalty=np.array([0.5], np.float32),
        presence_penalty=np.array([0.25], np.float32),
    )
    history = np.array([[1, 2, 2, 3, 3] + [4] * (LENGTH - 5)], np.int32)
    logits = np.array([[4, 4, 4, -4, 4, -4, 0]], np.float32)
    case = {"logits": logits, "arrays": arrays, "history": history, "bias": logits * 0, "num_tokens": num_tokens}
    assert run(case).tolist() == [[4, 2, 1.25, -9.25, 4, -4, 0]]


def test_stop_tokens_are_masked_until_the_minimum():
    arrays = neutral(1)._replace(min_len=np.array([4], np.int32), stop_token_ids=np.array([[6, -1, 0]], np.int32))
    zeros = np.zeros((1, VOCAB), np.float32)
    case = {"logits": zeros, "arrays": arrays, "history": np.zeros((1, LENGTH), np.int32), "bias": zeros}
    for num_tokens, masked in ((2, [0, 6]), (3, [0, 6]), (4, []), (5, [])):
        out = run({**case, "num_tokens": np.array([num_tokens], np.int32)})
        assert np.flatnonzero(np.isneginf(out[0])).tolist() == masked


def test_a_row_with_every_token_banned_gives_token_0_and_no_nan():
    """The host refuses what contradicts itself; what it lets through must still not become NaN or reach a neighbour."""
    rng = np.random.default_rng(3)
    case = random_case(rng)
    case["bias"][0] = -np.inf
    case["bias"][1:] = 0
    out = run(case)
    assert np.isneginf(out[0]).all() and not np.isnan(out).any()
    params = SamplingArrays(
        temperature=jnp.full(ROWS, 0.5),
        top_k=jnp.full(ROWS, 3),
        top_p=jnp.full(ROWS, 0.9),
        min_p=jnp.full(ROWS, 0.1),
        seed=jnp.arange(ROWS, dtype=jnp.uint32),
        draws=jnp.array(True),
        truncates=jnp.array(True),
    )
    draw = jax.jit(sample)
    tokens = np.asarray(draw(jnp.array(out), params, jnp.zeros(ROWS, jnp.int32)))
    assert tokens[0] == 0
    alone = np.where(np.arange(ROWS)[:, None] == 0, np.float32(1), out)
    assert np.asarray(draw(jnp.array(alone), params, jnp.zeros(ROWS, jnp.int32)))[1:].tolist() == tokens[1:].tolist()


def abstract_arguments(length: int, vocab: int, sharding: Any = None) -> list[Any]:
    case = random_case(np.random.default_rng(0))
    case["history"] = np.zeros((ROWS, length), np.int32)
    case["logits"] = case["bias"] = np.zeros((ROWS, vocab), np.float32)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), list(case.values()))


def test_nothing_grows_with_length_times_vocabulary():
    """Neither a sort nor a [L, V] array: at 128k tokens and 128k ids that would be 64 GiB a row."""
    length, vocab = 1000, 2000
    arguments = abstract_arguments(length, vocab)
    assert " sort" not in str(jax.make_jaxpr(process)(*arguments))
    memory = process_jit.lower(*arguments).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 8 * 4 * ROWS * (length + vocab)


def test_rows_on_several_devices_need_no_communication():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    jitted = jax.jit(process, out_shardings=sharding)
    text = jitted.lower(*abstract_arguments(LENGTH, VOCAB, sharding)).compile().as_text()
    assert not re.findall("all-gather|all-reduce|all-to-all|collective-permute", text or "all-gather")
