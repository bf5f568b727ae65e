"""How exactly matrices are multiplied: float32 in full, and what is shorter summed in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import models
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import bert
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from pallas_kernels.matmul import contract
from tests.parity import driver, recipe

SHAPES = driver.Shapes(rows=2, max_len=32, chunk=16, num_steps=2)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST, HIGHEST"), ("bfloat16", "DEFAULT, DEFAULT")])
@pytest.mark.parametrize("family", models.decoders())
def test_every_product_of_a_float32_step_is_full(
    family: str, dtype: str, precision: str, monkeypatch: pytest.MonkeyPatch
):
    """A GPU would round the operands to TF32, of ten bits. There is no kernel for CPUs there."""
    monkeypatch.setattr(Partitioner, "multiplies_in_kernel", False)
    config = models.get(family).parse_config(HFConfig(recipe.first_config(family)))
    definition = ModelDefinition.create(config, Partitioner.create(), jnp.dtype(dtype))
    programs = driver.step_programs(definition, SHAPES)
    for shape in programs.buckets.shapes():
        text = programs.lowered(shape).as_text()
        products = re.findall(r"dot_general .* precision = \[(\w+, \w+)\]", text)
        assert len(products) == text.count("dot_general") > 2 * 7  # two layers: four projections, attention, the MLP
        assert set(products) == {precision}


def test_every_product_of_an_encoder_is_full():
    config = bert.parse_config(HFConfig(recipe.first_config("bert")))
    definition = ModelDefinition.create(config, Partitioner.create(), jnp.dtype("float32"))
    tokens, lengths = jnp.zeros((1, 8), jnp.int32), jnp.ones(1, jnp.int32)
    run = jax.jit(lambda arrays: definition.bind_encoder(arrays)(tokens, lengths))
    products = re.findall(r"dot_general .* precision = \[(\w+, \w+)\]", run.lower(definition.abstract_arrays).as_text())
    assert len(products) > 2 * 7 and set(products) == {"HIGHEST, HIGHEST"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 64, 65])  # the last is written the other way round
def test_a_product_is_rounded_once(dtype: jnp.dtype, rows: int):
    """To within half a unit in the last place. A sum of 4096 terms in bfloat16 would be off by tens of them."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((rows, 4096), (32, 4096)))
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    error = np.abs(np.asarray(contract(x, weight), np.float64) - exact)
    assert (error <= np.abs(exact) * float(jnp.finfo(dtype).eps) / 2 + 1e-3).all()  # 1e-3: of the sum in float32
