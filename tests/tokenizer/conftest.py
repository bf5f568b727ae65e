import pytest

from jaxinfer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.directory import TEMPLATE, byte_fallback, byte_level, save


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    loaded = load_tokenizer(save(request.param(), tmp_path_factory.mktemp("tokenizer"), chat_template=TEMPLATE))
    assert loaded is not None
    return loaded
