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
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. `embed_dim` need not equal `num_q_heads * head_dim`."""

    family: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_position: int  # tokens that the position embedding was trained or scaled for
    norm_eps: float
    rope: RopeConfig
    activation: str = "silu"
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

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
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5
