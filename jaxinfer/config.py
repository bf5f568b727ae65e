"""What a model is, as numbers: the part of config.json that changes the mathematics.

Host only, no jax: the scheduler, the planner and the checkpoint reader use it too.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Attributes:
      theta: base of the geometric series of wavelengths.
      scaling: how frequencies are stretched beyond the training length: "default" (not at all), "linear"
        (all by `factor`), "llama3" (low frequencies by `factor`, smooth in between; Llama 3.1 model card) or "yarn"
        (the same with another blend; Peng et al. 2023, arXiv:2309.00071).
      factor: the stretch.
      low_freq_factor, high_freq_factor: llama3's two corners, in rotations over `original_max_position`.
      original_max_position: tokens that the model was trained on before stretching.
      share: of each head's dimensions, the first, that rotate; the rest stay as they are.
      interleaved: whether pairs are neighbours, (x[2i], x[2i + 1]), and not halves, (x[i], x[i + R/2]).
      beta_fast, beta_slow: yarn's two corners, in rotations over `original_max_position`.
      truncate: whether yarn's corners are moved outward to whole pairs.
      attention_factor: on cos and sin, so squared on what the rotating dimensions add to a score.
      mscale_all_dim: DeepSeek's, for the factor that it has on all scores; 0: none. See `yarn_mscale`.
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0
    share: float = 1.0
    interleaved: bool = False
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    mscale_all_dim: float = 0.0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln(factor) + 1: what yarn scales queries and keys by, stretched by `factor` (arXiv:2309.00071).

    DeepSeek-V2 (arXiv:2405.04434) multiplies its softmax scale by the square of that with `RopeConfig.mscale_all_dim`.
    """
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Keys and values of all heads as projections of one latent for each token, which is what the cache holds.

    Attributes:
      kv_rank: numbers in the latent.
      q_rank: the same for queries, which are not cached; None: they have none.
      key_dim, rope_dim: of each query and key, the part that comes from the latent, and the one that rotates.
      value_dim: of each head.
    """

    kv_rank: int
    q_rank: int | None
    key_dim: int
    rope_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in place of MLPs.

    Attributes, where the name does not say it:
      mlp_dim: of each expert.
      shared_mlp_dim: of the experts that every token goes through, together; 0: there are none.
      dense_layers: those that have an MLP and no experts.
      scoring: what makes scores of the router's logits, "softmax" or "sigmoid".
      normalize: whether the weights of a token's experts are scaled to a sum of one.
      scale: factor on these weights.
      num_groups, groups_per_token: neighbours among the experts are in groups, of which a token's best count.
      experts_per_group_score: how many of a group's experts are summed to its score.
      router_bias: on the logits.
      choice_bias: on the scores, for picking only.
      swiglu_limit: of experts with biases and the clamped SwiGLU of gpt-oss; None: the model's activation, no biases.
      swiglu_alpha: of that SwiGLU.
      placements: of each layer, the expert in each slot, of which the mesh has as many on every device. Not the model's
        but the engine's choice: an expert may be in several slots, as a copy. Empty: each in the slot of its number.
      backend: in `pallas_kernels/grouped_matmul/`, the engine's choice likewise.
    """

    num_experts: int
    num_experts_per_token: int
    mlp_dim: int
    shared_mlp_dim: int = 0
    dense_layers: frozenset[int] = frozenset()
    scoring: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    experts_per_group_score: int = 1
    router_bias: bool = False
    choice_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    placements: tuple[tuple[int, ...], ...] = ()
    backend: str = "xla"

    def __post_init__(self):
        if self.num_experts % self.num_groups:
            raise ValueError(f"config.json: {self.num_experts} experts do not divide into {self.num_groups} groups")
        of_group = self.num_experts // self.num_groups
        if self.groups_per_token > self.num_groups or self.experts_per_group_score > of_group:
            raise ValueError(
                f"config.json: {self.num_groups} groups of {of_group} experts; a token needs {self.groups_per_token} "
                f"groups, and a group's score {self.experts_per_group_score} experts"
            )
        in_groups = self.groups_per_token * of_group
        if self.num_experts_per_token > in_groups:
            raise ValueError(
                f"config.json: num_experts_per_tok is {self.num_experts_per_token}; a token's groups have {in_groups}"
            )

    def placement(self, layer: int) -> tuple[int, ...]:
        """The expert in each slot of a layer."""
        return self.placements[layer] if self.placements else tuple(range(self.num_experts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. `embed_dim` need not equal `num_q_heads * head_dim`.

    Attributes, where the name does not say it:
      max_position: tokens that the position embedding was trained or scaled for.
      rope: of all layers, or of those without a window; None: nothing rotates.
      window_rope: of layers with a window, where it is another.
      windows: by layer, the tokens that a query sees, its own included; None: all. Empty: all, in every layer.
      learned_positions: rows of a table of learned positions, added to the embedded tokens, where the last
        `max_position` rows are those of positions 0 and on; None: no such table.
      qk_norm: of queries and keys before rotation: "" (none), "head" (each head by itself), "all" (all heads as one).
      attention_bias: of queries, keys and values.
      attention_out_bias: of the projection back.
      attention_sinks: whether each query head has a learned score without a value, which joins the softmax's sum.
      query_scale: factor on attention's scores; None: head_dim ** -0.5.
      attention_soft_cap, logits_soft_cap: as `AttentionSpec.soft_cap`; None: none.
      embed_scale: factor on the embedded tokens.
      norms_before, norms_after: whether attention and MLP have a norm before them, and one behind, ahead of the sum.
      norm: of the residual stream: "rms", or "layer" with a bias.
      norm_offset: what is added to the stored scales of the RMS norms.
      gated_mlp: whether what the MLP's activation passes on is multiplied by a second projection.
      latent: what makes keys and values; then `num_kv_heads` and `head_dim` are those of the cache: one head, of latent
        and rotated key.
      moe: experts in place of the MLP, whose `mlp_dim` is then that of `dense_layers`.
    """

    family: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig | None
    window_rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = ()
    learned_positions: int | None = None
    qk_norm: str = ""
    activation: str = "silu"
    tie_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    attention_sinks: bool = False
    mlp_bias: bool = False
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    embed_scale: float = 1.0
    norms_before: bool = True
    norms_after: bool = False
    norm: str = "rms"
    norm_offset: float = 0.0
    gated_mlp: bool = True
    latent: LatentConfig | None = None
    moe: MoEConfig | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"config.json: {field.name} is {value}; it must be at least 1")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_q_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.rope is not None and (rotary_dim := int(self.rotary_head_dim * self.rope.share)) % 2:
            raise ValueError(f"config.json: {rotary_dim} of head_dim rotate; an odd number has no pairs")

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def rotary_head_dim(self) -> int:
        """Of what rotates, whole or by `rope.share`."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    def window(self, layer: int) -> int | None:
        """Tokens that a query of `layer` sees; None: all."""
        return self.windows[layer] if self.windows else None

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and layer not in self.moe.dense_layers

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Those that have experts."""
        return tuple(layer for layer in range(self.num_layers) if self.has_experts(layer))

    def layer_rope(self, layer: int) -> RopeConfig | None:
        return self.window_rope if self.window_rope is not None and self.window(layer) is not None else self.rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A transformer that reads a text as a whole and generates nothing, as BERT does.

    Attributes, where the name does not say it:
      max_position: rows of the position embedding, and so tokens of the longest text.
      num_token_types: rows of the token type embedding, of which a text that stands alone uses the first.
    """

    family: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_q_heads: int
    head_dim: int
    mlp_dim: int
    max_position: int
    num_token_types: int
    norm_eps: float
    activation: str

    @property
    def num_kv_heads(self) -> int:
        return self.num_q_heads

    @property
    def tie_embeddings(self) -> bool:
        """There is no head."""
        return False

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5
