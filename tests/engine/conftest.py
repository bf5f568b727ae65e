import pathlib

import pytest

from jaxinfer import Engine
from tests import tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def engine(model_dir: pathlib.Path):
    with Engine(str(model_dir), max_num_seqs=4, max_num_batched_tokens=32, decode_steps=4) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(engine: Engine):
    """After each test the shared engine is empty and its pages are all back."""
    yield
    engine._core.scheduler.check()
    assert not engine.has_unfinished_requests
    assert all(a.num_free == a.num_usable_pages for a in engine._core.scheduler.allocators)
