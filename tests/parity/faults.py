"""Mistakes that engines have made, each planted in ours by one patch. The parity check must see them all."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer import batch
from jaxinfer.config import ModelConfig
from jaxinfer.layers import attention_block, decoder, experts, mlp, norm
from pallas_kernels.paged_attention import blocks
from sharding_rules import axes as ax
from tests.parity.planting import Fault, of_attention, of_config, of_moe, of_rope, of_weights, wrap, zeros_at


def _rotate_interleaved(rotate: Callable) -> Callable:
    """Pairs (x[2i], x[2i + 1]), as the original Llama checkpoints have them."""

    def rotated(x, cos, sin, **_):
        halves = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        first, second = jnp.split(rotate(halves, cos, sin), 2, axis=-1)
        return jnp.stack([first, second], axis=-1).reshape(x.shape)

    return rotated


def _heads_strided(attend: Callable, q: jax.Array, positions: jax.Array) -> jax.Array:
    """Query head n reads KV head n % 2, not n // 4."""
    b, t, n, h = q.shape
    strided = q.reshape(b, t, n // 2, 2, h).swapaxes(2, 3).reshape(q.shape)
    return attend(strided, positions).reshape(b, t, 2, n // 2, h).swapaxes(2, 3).reshape(q.shape)


def _decode_one_late(build: Callable) -> Callable:
    def changed(*args):
        built = build(*args)
        late = built.positions + (built.positions > 0)
        if built.chunks is not None:
            num_chunks = built.chunks.lengths.shape[1]
            late[:, -num_chunks:] = built.positions[:, -num_chunks:]
        return built._replace(positions=late)

    return changed


def _chunks_one_late(build: Callable) -> Callable:
    def changed(*args):
        built = build(*args)
        if built.chunks is None:
            return built
        return built._replace(chunks=built.chunks._replace(starts=built.chunks.starts + (built.chunks.starts > 0)))

    return changed


def _page_twice(build: Callable) -> Callable:
    """The second page of a sequence is its first one again."""

    def changed(*args):
        built = build(*args)
        tables = built.block_tables.copy()
        tables[..., 1] = tables[..., 0]
        return built._replace(block_tables=tables)

    return changed


def _rounded(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(x.dtype)


def _round_softmax(attend: Callable) -> Callable:
    return lambda *arguments: jax.tree.map(_rounded, attend(*arguments))


def _norm_of_each_head(module: norm.RMSNorm, x: jax.Array) -> jax.Array:
    scale = module.scale[...]
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + module.eps) * scale


def _layer_norm_of_the_root_mean_square(module: norm.LayerNorm, x: jax.Array) -> jax.Array:
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + module.eps) * module.scale[...] + module.bias[...]


def _but_latents(normalise: Callable) -> Callable:
    def changed(module: norm.RMSNorm, x: jax.Array) -> jax.Array:
        is_of_latents = module.scale.get_metadata("logical_axes") == (ax.LATENT,)
        return x * module.scale[...] if is_of_latents else normalise(module, x)

    return changed


_windows_swapped = of_config(
    lambda c: {"windows": tuple(None if window else max(filter(None, c.windows)) for window in c.windows)}
)


def _up_not_raised(clamped_swiglu: Callable) -> Callable:
    """up, where it should be up + 1."""
    return lambda gate, up, *of: clamped_swiglu(gate, up, *of) - clamped_swiglu(gate, 0 * up, *of)


FAULTS = [
    Fault("rope theta over 50", of_rope(lambda rope: {"theta": rope.theta / 50})),
    Fault("llama3 rope scaling ignored", of_rope(lambda rope: {"scaling": "default"}), config="llama3_rope"),
    Fault("yarn scaling ignored", of_rope(lambda rope: {"scaling": "default"}), config="yarn", family="qwen2"),
    Fault(
        "yarn's factor on cos and sin ignored",
        of_rope(lambda rope: {"attention_factor": 1.0}),
        config="yarn",
        family="qwen2",
    ),
    Fault("rotated dims interleaved", wrap(attention_block, "rotate", _rotate_interleaved)),
    Fault(
        "rope positions in bfloat16",  # exact up to 256
        wrap(decoder, "rotation", lambda rotation: lambda p, *of: rotation(p.astype(jnp.bfloat16), *of)),
        needs_long_prompt=True,
    ),
    Fault("norm epsilon times 100", of_config(lambda c: {"norm_eps": 100 * c.norm_eps})),
    Fault("query heads strided over KV heads", of_attention(_heads_strided)),
    Fault("attention biases dropped", zeros_at("attention/", "/bias"), config="biases"),
    Fault(
        "separate head ignored",
        wrap(decoder.Decoder, "logits", lambda logits: lambda model, hidden: model.embedding.logits(hidden)),
    ),
    Fault("gelu for silu", lambda patch: patch.setitem(mlp.ACTIVATIONS, "silu", jax.nn.gelu)),
    Fault(
        "softmax scale 1 over head_dim",
        lambda patch: patch.setattr(ModelConfig, "softmax_scale", property(lambda config: 1 / config.head_dim)),
    ),
    Fault("weights in bfloat16", of_weights(lambda path, a: _rounded(a))),
    Fault("softmax in bfloat16", wrap(blocks, "_attend_block", _round_softmax)),
    Fault("decode one position late", wrap(batch, "build", _decode_one_late), decodes=True),
    Fault("later chunks one position late", wrap(batch, "build", _chunks_one_late), needs_long_prompt=True),
    Fault("mask shows the next token", of_attention(lambda attend, q, positions: attend(q, positions + 1))),
    Fault("block table names a page twice", wrap(batch, "build", _page_twice)),
    Fault("window ignored", of_config(lambda c: {"windows": ()}), family="mistral", needs_long_prompt=True),
    Fault(
        "window one token too wide",
        of_config(lambda c: {"windows": tuple(window and window + 1 for window in c.windows)}),
        family="mistral",
        needs_long_prompt=True,
    ),
    Fault(
        "windows in the other layers",
        _windows_swapped,
        family="gemma2",
        needs_long_prompt=True,
    ),
    Fault("window layers rotate as the others", of_config(lambda c: {"window_rope": None}), family="gemma3"),
    Fault("scores not capped", of_config(lambda c: {"attention_soft_cap": None}), family="gemma2"),
    Fault("logits not capped", of_config(lambda c: {"logits_soft_cap": None}), family="gemma2"),
    Fault("query scale ignored", of_config(lambda c: {"query_scale": None}), family="gemma2"),
    Fault("embedding not scaled", of_config(lambda c: {"embed_scale": 1.0}), family="gemma2"),
    Fault("norm offset ignored", of_config(lambda c: {"norm_offset": 0.0}), family="gemma2"),
    Fault(
        "norms of queries and keys all ones",
        of_weights(lambda path, a: jnp.ones_like(a) if "q_norm" in path or "k_norm" in path else a),
        family="qwen3",
    ),
    Fault(
        "norms of queries head by head",
        wrap(norm.RMSNorm, "__call__", lambda call: _norm_of_each_head),
        family="olmo2",
    ),
    Fault("neighbours not paired", of_rope(lambda rope: {"interleaved": False}), family="glm4"),
    Fault("all of a head rotates", of_rope(lambda rope: {"share": 1.0}), family="phi3", config="partial_rope"),
    Fault(
        "positions looked up two rows early", of_config(lambda c: {"max_position": c.learned_positions}), family="opt"
    ),
    Fault(
        "mean of layer norm not subtracted",
        wrap(norm.LayerNorm, "__call__", lambda call: _layer_norm_of_the_root_mean_square),
        family="opt",
    ),
    Fault(
        "weights of experts not normalised",
        of_moe(lambda moe: {"normalize": False}),
        family="mixtral",
    ),
    Fault(
        "one expert too few",
        of_moe(lambda moe: {"num_experts_per_token": moe.num_experts_per_token - 1}),
        family="qwen3_moe",
    ),
    Fault(
        "groups of experts ignored",
        of_moe(lambda moe: {"num_groups": 1, "groups_per_token": 1}),
        family="deepseek",
    ),
    Fault("bias on the choice of experts ignored", zeros_at("choice_bias"), family="deepseek"),
    Fault("shared experts dropped", zeros_at("shared/down"), family="deepseek"),
    Fault("weights of experts not scaled", of_moe(lambda moe: {"scale": 1.0}), family="deepseek"),
    Fault("latents not normalised", wrap(norm.RMSNorm, "__call__", _but_latents), family="deepseek"),
    Fault(
        "scores not scaled for the stretch",
        of_config(lambda c: {"query_scale": c.query_scale and c.query_scale / 1.3}),
        family="deepseek",
        config="v2",
    ),
    Fault(
        "experts one place on",
        of_weights(lambda path, a: jnp.roll(a, 1, axis=0) if path.endswith("experts/down") else a),
        family="mixtral",
    ),
    Fault(
        "sinks dropped",
        of_weights(lambda path, a: jnp.full_like(a, -jnp.inf) if path.endswith("sinks") else a),
        family="gpt_oss",
    ),
    Fault("yarn's factor ignored in gpt-oss", of_rope(lambda rope: {"attention_factor": 1.0}), family="gpt_oss"),
    Fault("windows in the other layers of gpt-oss", _windows_swapped, family="gpt_oss", needs_long_prompt=True),
    Fault("SwiGLU not clamped", of_moe(lambda moe: {"swiglu_limit": 1e9}), family="gpt_oss"),
    Fault("up without its one", wrap(experts, "clamped_swiglu", _up_not_raised), family="gpt_oss"),
    Fault("first biases of experts dropped", zeros_at("experts/gate_up_bias"), family="gpt_oss"),
    Fault("last biases of experts dropped", zeros_at("experts/down_bias"), family="gpt_oss"),
    Fault("router's bias dropped", zeros_at("router/bias"), family="gpt_oss"),
    Fault("biases of layer norms dropped", zeros_at("norm/", "/bias"), family="opt"),
    Fault("biases of MLPs dropped", zeros_at("mlp/", "/bias"), family="opt"),
    Fault("learned positions dropped", zeros_at("position_embedding"), family="gpt2"),
    Fault("exact gelu for its approximation", of_config(lambda c: {"activation": "gelu"}), family="gpt2"),
]
