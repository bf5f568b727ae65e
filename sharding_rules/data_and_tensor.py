"""Replicas of a tensor-parallel group: sequences over `data`, matrices over `tensor`."""

from sharding_rules.rule_set import rule_set

RULES = rule_set(
    "data_and_tensor",
    batch="data",
    pages="data",
    heads="tensor",
    kv_heads="tensor",
    mlp="tensor",
    vocab="tensor",
)
