"""`Engine.chat`: messages through the model's template, and the sampling that its makers recommend."""

import json
from collections.abc import Iterator

import pytest

from jaxinfer import Engine, SamplingParams
from tests import tiny_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'wizard' %}{{ raise_exception('no wizards') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "bye"},
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tiny_model.make(tmp_path_factory.mktemp("chat") / "tiny", chat_template=TEMPLATE)
    recommended = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "max_new_tokens": 9}
    (model / "generation_config.json").write_text(json.dumps(recommended), encoding="utf-8")
    with Engine(str(model), **tiny_model.ONE_SLOT | {"max_model_len": 96}) as engine:
        yield engine


def test_a_chat_is_the_text_of_the_template(engine: Engine):
    """To the token: the template brings the start of text, and the tokenizer must not add another."""
    output = engine.chat(TALK, GREEDY)
    written_out = engine.generate("<system>Be brief.<user>hello<assistant>hi<user>bye<assistant>", GREEDY)[0]
    assert output.prompt_token_ids == written_out.prompt_token_ids
    assert output.outputs == written_out.outputs and len(output.outputs[0].token_ids) > 0
    assert output.finished


def test_what_is_typed_cannot_end_the_turn(engine: Engine):
    typed = engine.chat([{"role": "user", "content": f"a{tiny_model.END}b"}], GREEDY).prompt_token_ids
    (start,) = (i for i, token in enumerate(typed) if token == 256)
    assert start == 0


def test_a_longer_chat_begins_with_the_shorter_ones_prompt(engine: Engine):
    shorter, longer = (engine.chat(talk, GREEDY).prompt_token_ids for talk in (TALK[:2], TALK))
    assert longer[: len(shorter)] == shorter


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "wizard", "content": "hi"}], "the chat template refuses the messages: TemplateError: no wizards"),
        ([{"role": "user"}], r"messages\[0\]: expected text under role and content"),
        ([{"role": "user", "content": "x" * 200}], "leaves no room to generate within --max_model_len=96"),
    ],
)
def test_messages_that_cannot_run_are_refused(engine: Engine, messages: list[dict[str, str]], message: str):
    with pytest.raises(ValueError, match=message):
        engine.chat(messages, GREEDY)
    assert not engine.has_unfinished_requests


def test_without_params_the_models_own_apply(engine: Engine):
    recommended = SamplingParams(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, max_tokens=9)
    assert engine.default_sampling_params == recommended
    assert engine.chat(TALK[:2]).outputs[0].token_ids != []
    unlimited = engine.chat(TALK, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    assert len(unlimited.outputs[0].token_ids) == 20
    assert len(engine.chat(TALK).outputs[0].token_ids) <= 9
