"""Every device holds everything: the one-device reference."""

from sharding_rules.rule_set import rule_set

RULES = rule_set("replicated")
