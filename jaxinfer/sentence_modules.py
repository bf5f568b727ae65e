"""What sentence-transformers' modules.json says is done behind the model. Host only.

An embedding model is often published with that file: which modules a text goes through. The first is the model
itself, and pooling and normalisation are what `Engine.embed` is asked for; anything else would be left out.
"""

import json
import pathlib

_FILE = "modules.json"
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
