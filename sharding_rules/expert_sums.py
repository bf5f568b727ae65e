"""As `inference`, but every device of `expert` has all tokens of its data shard: what a device's experts add to them is
summed by an all-reduce, and outside of experts `expert` splits what `tensor` does. For few sequences: nothing waits for
a token that is on its way.
"""

from sharding_rules.rule_set import rule_set

RULES = rule_set(
    "expert_sums",
    layers="stage",
    batch="data",
    pages=("data", "context"),
    heads=("expert", "tensor"),
    kv_heads=("expert", "tensor"),
    mlp=("expert", "context", "tensor"),
    experts="expert",
    expert_mlp=("context", "tensor"),
    vocab=("stage", "expert", "context", "tensor"),
)
