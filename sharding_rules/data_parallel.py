"""Weights on every device; sequences and their cache pages are divided among the devices."""

from sharding_rules.rule_set import rule_set

RULES = rule_set("data_parallel", batch="data", pages="data")
