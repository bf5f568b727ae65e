"""Model directories made to run code or to read what lies outside: each either works as if it were not, or is refused.

Every trap would leave a file behind, the canary, or open one that lies beside the model.
"""

import json
import os
import pathlib
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator

import pytest

from jaxinfer import Engine
from jaxinfer.checkpoint import conversion
from jaxinfer.runner import Runner
from jaxinfer.tokenizer import load_tokenizer
from tests import tiny_model

CANARY, OUTSIDE = "canary", "outside.json"
MESSAGES = [{"role": "user", "content": "hi"}]


def edit(path: pathlib.Path, **values: object) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | values))


def code(model_dir: pathlib.Path) -> str:
    """Python whose import or execution leaves the canary."""
    return f"open({str(model_dir.parent / CANARY)!r}, 'w').close()\nclass Evil: pass\n"


class Payload:
    def __init__(self, model_dir: pathlib.Path):
        self._code = code(model_dir)

    def __reduce__(self):
        return exec, (self._code,)


def own_config_class(d: pathlib.Path) -> None:
    (d / "evil.py").write_text(code(d))
    edit(d / "config.json", auto_map={"AutoConfig": "evil.Evil"})


def own_model_class(d: pathlib.Path) -> None:
    (d / "evil.py").write_text(code(d))
    edit(d / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})


def own_tokenizer_class(d: pathlib.Path) -> None:
    (d / "evil.py").write_text(code(d))
    edit(d / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]}, tokenizer_class="Evil")


def own_tokenizer_class_alone(d: pathlib.Path) -> None:
    """Without tokenizer.json, so that transformers looks for the class."""
    own_tokenizer_class(d)
    (d / "tokenizer.json").unlink()


def attention_from_the_hub(d: pathlib.Path) -> None:
    (d / "evil.py").write_text(code(d))
    edit(d / "config.json", _attn_implementation_internal="evil/kernels", attn_implementation="evil/kernels")


def own_generate(d: pathlib.Path) -> None:
    (d / "custom_generate").mkdir()
    (d / "custom_generate" / "generate.py").write_text(code(d))
    edit(d / "generation_config.json", custom_generate=str(d), trust_remote_code=True)


def pickles_beside_the_weights(d: pathlib.Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (d / name).write_bytes(pickle.dumps(Payload(d)))


def pickles_for_weights(d: pathlib.Path) -> None:
    pickles_beside_the_weights(d)
    (d / "model.safetensors").unlink()


def pickles_called_safetensors(d: pathlib.Path) -> None:
    (d / "model.safetensors").write_bytes(pickle.dumps(Payload(d)))


def a_template_that_escapes(d: pathlib.Path) -> None:
    walk = "().__class__.__base__.__subclasses__()"
    (d / "chat_template.jinja").write_text(
        "{% for c in " + walk + " %}{% if c.__name__ == 'Popen' %}"
        f"{{{{ c(['touch', '{d.parent / CANARY}']) }}}}"
        "{% endif %}{% endfor %}x"
    )


def a_template_that_includes(d: pathlib.Path) -> None:
    edit(d / "tokenizer_config.json", chat_template=f"{{% include '../{OUTSIDE}' %}}")


def a_tokenizer_elsewhere(d: pathlib.Path) -> None:
    (d / "tokenizer.json").rename(d.parent / OUTSIDE)
    outside = str(d.parent / OUTSIDE)
    names = {"fast_tokenizer_files": [f"../{OUTSIDE}", "tokenizer.9.9.9.json"], "tokenizer_file": outside}
    edit(d / "tokenizer_config.json", vocab_file=outside, name_or_path=outside, **names)


def an_adapter_elsewhere(d: pathlib.Path) -> None:
    edit(d / "adapter_config.json", base_model_name_or_path=f"../{OUTSIDE}", peft_type="LORA", auto_mapping={"x": "y"})


def a_link(name: str) -> Callable[[pathlib.Path], None]:
    def trap(d: pathlib.Path) -> None:
        """To the same file, moved out: so that whoever follows the link notices nothing."""
        (d / name).rename(d.parent / OUTSIDE)
        (d / name).symlink_to(d.parent / OUTSIDE)

    trap.__name__ = f"a_link_from_{name}"
    return trap


def a_linked_folder(d: pathlib.Path) -> None:
    (d.parent / "1_Pooling").mkdir()
    (d / "1_Pooling").symlink_to(d.parent / "1_Pooling")


def a_store_that_leads_on(d: pathlib.Path) -> None:
    """The folder of the download cache's files, and a link in it."""
    (d.parent / "blobs").mkdir()
    (d.parent / "blobs" / "config.json").symlink_to(d.parent / OUTSIDE)
    snapshot = d.parent / "snapshots" / "abc"
    shutil.copytree(d, snapshot)
    shutil.rmtree(d)
    d.symlink_to(snapshot)
    (snapshot / "1_Pooling").symlink_to(d.parent / "blobs")


def a_pipe(d: pathlib.Path) -> None:
    (d / "generation_config.json").unlink()
    os.mkfifo(d / "generation_config.json")


def an_index_that_leads_out(d: pathlib.Path) -> None:
    (d / "model.safetensors").rename(d.parent / OUTSIDE)
    (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"../{OUTSIDE}"}}))


TRAPS: dict[Callable[[pathlib.Path], None], str | None] = {  # and what the refusal says, if it is one
    own_config_class: None,
    own_model_class: "config.json: auto_map=",
    own_tokenizer_class: None,
    own_tokenizer_class_alone: "the tokenizer files cannot be read",
    attention_from_the_hub: r"unknown keys \['_attn_implementation_internal'",
    own_generate: None,
    pickles_beside_the_weights: None,
    pickles_for_weights: r"only safetensors is read, not 3 \(.*pytorch_model.bin",
    pickles_called_safetensors: "model.safetensors: corrupt, truncated or unreadable",
    a_template_that_escapes: "the chat template refuses the messages",
    a_template_that_includes: "the chat template refuses the messages",
    a_tokenizer_elsewhere: "the tokenizer files cannot be read",
    an_adapter_elsewhere: None,
    a_linked_folder: "1_Pooling is a link that leads out of the directory",
    a_store_that_leads_on: "1_Pooling is a link that leads out of the directory",
    a_pipe: "generation_config.json is not a regular file",
    an_index_that_leads_out: "expected the plain name of a .safetensors file",
    **{
        a_link(name): f"{name} is a link that leads out of the directory"
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    },
}


class Opened:
    """The files that Python opens, while it is told to look; a hook of the interpreter cannot be taken away.

    It does not see safetensors open one: tests/hf_reader/test_trust.py is about weights.
    """

    def __init__(self):
        self.paths: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if self.paths is not None and event == "open" and isinstance(args[0], str | bytes):
            self.paths.append(os.path.realpath(os.fsdecode(args[0])))


@pytest.fixture(scope="module")
def opened_files() -> Opened:
    return Opened()


@pytest.fixture
def opened(opened_files: Opened) -> Iterator[list[str]]:
    opened_files.paths = paths = []
    yield paths
    opened_files.paths = None


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    model_dir = tiny_model.make(tmp_path_factory.mktemp("models") / "tiny", chat_template="{{ messages[0].content }}")
    edit(model_dir / "generation_config.json", temperature=0.5)
    return model_dir


@pytest.fixture
def model_dir(harmless: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / OUTSIDE).write_text("{}")
    return shutil.copytree(harmless, tmp_path / "model")


def convert(model_dir: pathlib.Path) -> None:
    conversion.convert(conversion.Source.open(model_dir), model_dir.parent / "orbax", lambda done, total: None)


def run(model_dir: pathlib.Path) -> None:
    """Up to the first token: what comes then does not look at the directory."""
    with Engine(model=str(model_dir)):
        pass


def chat(model_dir: pathlib.Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer is not None
    tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_nothing_runs_and_nothing_outside_is_read(
    trap: Callable[[pathlib.Path], None],
    model_dir: pathlib.Path,
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(Runner, "start_compiling", lambda *_, **__: None)
    trap(model_dir)
    monkeypatch.chdir(model_dir)
    refusals = []
    for use in (convert, run, chat):
        try:
            use(model_dir)
        except ValueError as error:
            refusals.append(str(error))
    message = TRAPS[trap]
    assert not refusals if message is None else any(re.search(message, refusal) for refusal in refusals)
    outside = model_dir.parent / OUTSIDE
    assert str(outside) not in opened
    assert not (model_dir.parent / CANARY).exists()
    outside.read_bytes()
    assert str(outside) in opened  # the hook would have seen it
