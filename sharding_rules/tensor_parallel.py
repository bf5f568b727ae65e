"""Each device holds a slice of every matrix (Megatron-LM, Shoeybi et al. 2019).

Attention splits by head and the MLP by hidden unit, so a layer needs two all-reduces: after the
attention's output projection and after the MLP's down projection.
"""

from sharding_rules.rule_set import rule_set

RULES = rule_set("tensor_parallel", heads="tensor", kv_heads="tensor", mlp="tensor", vocab="tensor")
