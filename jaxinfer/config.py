"""What a model is, as numbers: the part of config.json that changes the mathematics.

Host only, no jax: the scheduler, the planner and the checkpoint reader use it too.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Attributes:
      theta: base of the geometric series of wavelengths.
      scaling: how frequencies are stretched beyond the training length: "default" (not at all), "linear"
        (all by `factor`) or "llama3" (low frequencies by `factor`, smooth in between; Llama 3.1 model card).
      factor: the stretch.
      low_freq_factor, high_freq_factor: llama3's two corners, in rotations over `original_max_position`.
      original_max_position: tokens that the model was trained on before stretching.
      share: of each head's dimensions, the first, that rotate; the rest stay as they are.
      interleaved: whether pairs are neighbours, (x[2i], x[2i + 1]), and not halves, (x[i], x[i + R/2]).
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0
    share: float = 1.0
    interleaved: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. `embed_dim` need not equal `num_q_heads * head_dim`.

    Attributes, where the name does not say it:
      max_position: tokens that the position embedding was trained or scaled for.
      rope: of all layers, or of those without a window.
      window_rope: of layers with a window, where it is another.
      windows: by layer, the tokens that a query sees, its own included; None: all. Empty: all, in every layer.
      qk_norm: of queries and keys before rotation: "" (none), "head" (each head by itself), "all" (all heads as one).
      attention_bias: of queries, keys and values.
      attention_out_bias: of the projection back.
      query_scale: factor on attention's scores; None: head_dim ** -0.5.
      attention_soft_cap, logits_soft_cap: as `AttentionSpec.soft_cap`; None: none.
      embed_scale: factor on the embedded tokens.
      norms_before, norms_after: whether attention and MLP have a norm before them, and one behind, ahead of the sum.
      norm_offset: what is added to the stored scales of the norms.
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
    rope: RopeConfig
    window_rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = ()
    qk_norm: str = ""
    activation: str = "silu"
    tie_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    embed_scale: float = 1.0
    norms_before: bool = True
    norms_after: bool = False
    norm_offset: float = 0.0

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
        rotary_dim = int(self.head_dim * self.rope.share)
        if rotary_dim % 2:
            raise ValueError(f"config.json: {rotary_dim} of head_dim rotate; an odd number has no pairs")

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def window(self, layer: int) -> int | None:
        """Tokens that a query of `layer` sees; None: all."""
        return self.windows[layer] if self.windows else None

    def layer_rope(self, layer: int) -> RopeConfig:
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
