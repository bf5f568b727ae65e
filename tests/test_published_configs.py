"""Published models are accepted as they are, and are as large as they were published to be. Nothing is allocated."""

import math

import jax.numpy as jnp
import pytest

from jaxinfer import models
from jaxinfer.config import ModelConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from tests import published

# By file: family; layers, query heads, KV heads, head_dim; parameters, as the page of the weights counts them.
MODELS = {
    "bge_small_en_v1_5": ("bert", (12, 12, 12, 32), 33_360_000 - 384 * 385),  # without its pooler
    "deepseek_v2_lite": ("deepseek", (27, 16, 1, 576), 15_706_484_224),
    "deepseek_v3": ("deepseek", (61, 128, 1, 576), 671_026_419_200),
    "gemma_2_9b": ("gemma2", (42, 16, 8, 256), 9_241_705_984),
    "gemma_3_1b_it": ("gemma3", (26, 4, 1, 256), 999_885_952),
    "glm_4_9b_0414": ("glm4", (40, 32, 2, 128), 9_400_279_040),
    "gpt2": ("gpt2", (12, 12, 12, 64), 124_439_808),
    "gpt_oss_20b": ("gpt_oss", (24, 64, 8, 64), 20_914_757_184),
    "llama_2_13b": ("llama", (40, 40, 40, 128), 13_015_864_320),
    "llama_2_7b": ("llama", (32, 32, 32, 128), 6_738_415_616),
    "llama_3_1_70b_instruct": ("llama", (80, 64, 8, 128), 70_553_706_496),
    "llama_3_1_8b_instruct": ("llama", (32, 32, 8, 128), 8_030_261_248),
    "llama_3_2_1b": ("llama", (16, 32, 8, 64), 1_235_814_400),
    "mistral_7b_v0_1": ("mistral", (32, 32, 8, 128), 7_241_732_096),
    "mistral_7b_v0_3": ("mistral", (32, 32, 8, 128), 7_248_023_552),
    "mixtral_8x7b_instruct_v0_1": ("mixtral", (32, 32, 8, 128), 46_702_792_704),
    "olmo_2_7b": ("olmo2", (32, 32, 32, 128), 7_298_617_344),
    "opt_125m": ("opt", (12, 12, 12, 64), 125_239_296),
    "phi_3_mini_4k_instruct": ("phi3", (32, 32, 32, 96), 3_821_079_552),
    "phi_4": ("phi3", (40, 40, 10, 128), 14_659_507_200),
    "qwen_2_5_7b": ("qwen2", (28, 28, 4, 128), 7_615_616_512),
    "qwen_2_5_7b_instruct": ("qwen2", (28, 28, 4, 128), 7_615_616_512),
    "qwen_3_30b_a3b": ("qwen3_moe", (48, 32, 4, 128), 30_532_122_624),
    "qwen_3_8b": ("qwen3", (36, 32, 8, 128), 8_190_735_360),
    "qwq_32b": ("qwen2", (64, 40, 8, 128), 32_763_876_352),
}


def test_every_file_and_every_family_is_here():
    assert sorted(MODELS) == published.names()
    assert {family for family, _, _ in MODELS.values()} == set(models.families())


@pytest.mark.parametrize("name", MODELS)
def test_accepted_with_the_published_size(name: str):
    config = published.read(name)
    family, dimensions, num_params = MODELS[name]
    assert config.family == family
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads, config.head_dim) == dimensions
    definition = ModelDefinition.create(config, Partitioner.abstract(""), jnp.dtype("bfloat16"))
    assert sum(math.prod(spec.shape) for spec in definition.params) == num_params


def windows(config: ModelConfig) -> list[int | None]:
    return [config.window(layer) for layer in range(config.num_layers)]


def test_windows_and_ropes_as_published():
    """What a wrong reading would leave plausible: lengths and counts are right, and the text is not."""
    assert windows(published.read("mistral_7b_v0_1")) == [4096] * 32
    for name in ("mistral_7b_v0_3", "phi_4", "qwen_2_5_7b", "qwen_3_8b", "qwq_32b"):  # they have the key, and no window
        assert not published.read(name).windows, name
    assert windows(published.read("phi_3_mini_4k_instruct")) == [2047] * 32
    assert windows(published.read("gemma_2_9b")) == [4096, None] * 21
    gemma3 = published.read("gemma_3_1b_it")
    assert windows(gemma3) == ([512] * 5 + [None]) * 4 + [512] * 2
    ropes = [gemma3.layer_rope(layer) for layer in (4, 5)]
    assert [rope and rope.theta for rope in ropes] == [10_000, 1_000_000]
    llama2, glm = published.read("llama_2_7b").rope, published.read("glm_4_9b_0414").rope
    assert llama2 is not None and llama2.theta == 10_000
    assert glm is not None and (glm.share, glm.interleaved) == (0.5, True)
    llama = published.read("llama_3_2_1b").rope
    assert llama is not None
    assert (llama.theta, llama.scaling, llama.factor, llama.original_max_position) == (500_000, "llama3", 32, 8192)
