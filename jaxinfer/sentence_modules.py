"""What sentence-transformers' files say is done before and behind the model. Host only.

An embedding model is often published with them: modules.json has the modules that a text goes through, of which the
first is the model itself, and pooling and normalisation are done by `Engine.embed`; anything else would be left out.
"""

import json
import pathlib

from jaxinfer.model_files import read_json_object

_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
TEXT_FILE = "sentence_bert_config.json"
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_KNOWN = ("Transformer", "Pooling", "Normalize")


def check_modules(model_dir: pathlib.Path) -> None:
    """Raises ValueError for a directory whose vectors are made by more than model, pooling and normalisation."""
    path = model_dir / _FILE
    if not path.exists():
        return
    try:
        names = [module["type"].rpartition(".")[2] for module in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable list of modules: {type(error).__name__}: {error}") from None
    if unknown := [name for name in names if name not in _KNOWN]:
        raise ValueError(
            f"{path}: {', '.join(unknown)} is not implemented; implemented: {', '.join(_KNOWN)}; without the file the "
            f"vectors are those before it"
        )


def read_pooling(path: pathlib.Path) -> str:
    """ "mean" or "cls", whichever the file at `path` says. Raises ValueError for any other, and for several."""
    values = read_json_object(path)
    chosen = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise ValueError(f"{path}: {chosen} is not implemented; implemented: one of {', '.join(_POOLINGS)}")
    return _POOLINGS[chosen[0]]


def check_text(path: pathlib.Path) -> None:
    """Raises ValueError where the file at `path` asks for a change of the text before the tokenizer sees it."""
    if read_json_object(path).get("do_lower_case", False) is not False:
        raise ValueError(f"{path}: do_lower_case is not implemented; a tokenizer that needs it has it in its own files")
