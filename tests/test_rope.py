"""Frequencies and factors of yarn against the paper's formula by hand and transformers' own."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import RopeConfig
from jaxinfer.hf_rope import rope_config
from jaxinfer.layers.rope import inverse_frequencies, rotation

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}


def test_yarn_by_hand():
    """Pair i of 8 turns 256 / (2 pi 10^(i / 2)) times: pair 0 more often than 32, from pair 4 on less than once."""
    rope = RopeConfig(10000.0, "yarn", 4.0, original_max_position=256)
    kept = 10.0 ** -np.arange(0, 4, 0.5)
    slowed = np.minimum(np.arange(8) / 4, 1)
    np.testing.assert_allclose(inverse_frequencies(rope, 16), kept * (1 - slowed) + kept / 4 * slowed, rtol=1e-6)


def test_factor_is_on_cos_and_sin():
    freqs = np.array([1.0, 0.1], np.float32)
    plain, scaled = (rotation(jnp.arange(3), freqs, factor) for factor in (1.0, 1.5))
    np.testing.assert_array_equal(scaled, 1.5 * np.array(plain))


@pytest.mark.parity
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
        {"truncate": False, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 150000.0},
        {"mscale": 1.0, "mscale_all_dim": 0.707, "factor": 40.0},
        {"attention_factor": 1.25},
        {"factor": 1.0},
        {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
        {"original_max_position_embeddings": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_yarn_is_that_of_transformers(keys: dict[str, Any], head_dim: int):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = YARN | keys
    theirs = LlamaConfig(head_dim=head_dim, rope_parameters=dict(values), max_position_embeddings=1024)
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    ours = rope_config(dict(values), "config.json")
    np.testing.assert_allclose(inverse_frequencies(ours, head_dim), expected.numpy(), rtol=1e-6)
    assert ours.attention_factor == pytest.approx(expected_factor, rel=1e-12)
