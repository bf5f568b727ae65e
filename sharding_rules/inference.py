"""The table for inference: every mesh axis in one place. A mesh that lacks an axis leaves unsplit what it would split.

- `tensor` splits heads and hidden units (Megatron-LM, Shoeybi et al. 2019): two all-reduces a layer.
- `stage` splits the layers into a pipeline, and the vocabulary, so that the ends of the model are every stage's work.
  A vocabulary that does not divide over all of its axes is split over those that it divides over.
- `data` splits sequences and their cache pages. So does `expert`, and where tokens are split a token travels to the
  devices that have its experts and back: two all-to-alls a layer.
- `context` splits the cache pages of a sequence (DistAttention, Infinite-LLM, arXiv:2401.02669), and beside attention,
  where a sequence's tokens are on all of its devices, the hidden units (as Helix does, arXiv:2507.07120).
"""

from sharding_rules.rule_set import rule_set

RULES = rule_set(
    "inference",
    layers="stage",
    batch=("data", "expert"),
    pages=("data", "expert", "context"),
    heads="tensor",
    kv_heads="tensor",
    mlp=("context", "tensor"),
    experts="expert",
    expert_mlp=("context", "tensor"),
    vocab=("stage", "context", "tensor"),
)
