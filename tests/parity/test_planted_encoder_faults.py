"""Does the encoders' parity check bite? Planted faults, each of which must raise the error above what parity allows."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import attention, embedder
from jaxinfer.config import EncoderConfig
from jaxinfer.embedder import Vectors
from jaxinfer.layers import encoder, mlp
from tests.parity import driver, encoder_driver, encoder_golden, golden, recipe
from tests.parity.planting import Plant


@dataclasses.dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
      name: what is wrong.
      plant: puts it in; undone with the patch.
      config: the tiny BERT that has what is broken.
    """

    name: str
    plant: Plant
    config: str = "mha"

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


def _weights(change: Callable[[str, jax.Array], jax.Array]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        load = driver.load_weights

        def load_changed(model_dir, definition):
            arrays = load(model_dir, definition)
            return tuple(change(spec.path, array) for spec, array in zip(definition.params, arrays, strict=True))

        patch.setattr(driver, "load_weights", load_changed)

    return plant


def _zeroed(end: str) -> Plant:
    """The parameters whose path ends so."""
    return _weights(lambda path, array: jnp.zeros_like(array) if path.endswith(end) else array)


def _attention(attend: Callable) -> Plant:
    return lambda patch: patch.setattr(encoder, "bidirectional_attention", attend)


def _to_padding(q, k, v, scale, lengths):
    return attention.bidirectional_attention(q, k, v, scale, jnp.full_like(lengths, q.shape[1]))


def _causal(q, k, v, scale, lengths):
    return attention.causal_attention(q, k, v, scale)


def _pooling(change: Callable[[jax.Array, Vectors], Vectors]) -> Plant:
    """`change(hidden, vectors)` instead of the vectors, where `hidden` is [B, T, D]."""

    def pooled(hidden: jax.Array, lengths: jax.Array) -> Vectors:
        return change(hidden, embedder.pool(hidden, lengths))

    return lambda patch: patch.setattr(encoder_driver, "pool", pooled)


def _norms_before(block: encoder.EncoderBlock, x: jax.Array, lengths: jax.Array) -> jax.Array:
    x = x + block.attention(block.attention_norm(x), lengths)
    return x + block.mlp(block.mlp_norm(x))


def _epsilon_of_bert(patch: pytest.MonkeyPatch) -> None:
    """Whatever config.json says."""
    read = driver.read_config
    patch.setattr(driver, "read_config", lambda model_dir: dataclasses.replace(read(model_dir), norm_eps=1e-12))


FAULTS = [
    Fault("token type dropped", _zeroed("token_type_embedding")),
    Fault("position dropped", _zeroed("position_embedding/table")),
    Fault("attention biases dropped", _zeroed("q/bias")),
    Fault("MLP biases dropped", _zeroed("down/bias")),
    Fault("norm biases dropped", _zeroed("mlp_norm/bias")),
    Fault("norm of the embedding without scale", _weights(lambda p, a: jnp.ones_like(a) if p == "norm/scale" else a)),
    Fault("padding attended to", _attention(_to_padding)),
    Fault("causal mask", _attention(_causal)),
    Fault("mean over padding", _pooling(lambda hidden, vectors: vectors._replace(mean=jnp.mean(hidden, axis=1)))),
    Fault("cls of the second token", _pooling(lambda hidden, vectors: vectors._replace(cls=hidden[:, 1]))),
    Fault("norms before the sums", lambda patch: patch.setattr(encoder.EncoderBlock, "__call__", _norms_before)),
    Fault("gelu by tanh", lambda patch: patch.setitem(mlp.ACTIVATIONS, "gelu", jax.nn.gelu)),
    Fault(
        "softmax scale 1 over head_dim",
        lambda patch: patch.setattr(EncoderConfig, "softmax_scale", property(lambda config: 1 / config.head_dim)),
    ),
    Fault("norm epsilon ignored", _epsilon_of_bert, config="gelu_new"),
    Fault("weights in bfloat16", _weights(lambda path, array: array.astype(jnp.bfloat16).astype(array.dtype))),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_detected(fault: Fault, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    hf_config = recipe.tiny_config("bert", fault.config)
    model_dir = recipe.write_model(tmp_path / "model", hf_config, recipe.weights("bert", hf_config))
    texts = encoder_golden.load("bert", fault.config)
    fault.plant(monkeypatch)
    ours = encoder_driver.encode(model_dir, [text.prompt for text in texts])
    short, long = (text.error(mine) for text, mine in zip(texts, ours, strict=True))
    print(f"{fault.name:36} relative error with 4 tokens {short:.1e}, with 600 tokens {long:.1e}")
    assert min(short, long) > golden.MAX_ERROR
