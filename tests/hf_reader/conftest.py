import pathlib

import pytest

from tests.hf_reader.directory import write


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    return write(tmp_path / "model")[0]
