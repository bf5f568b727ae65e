"""Sharding strategies: one file each, found by name.

A strategy is a module in this folder with a `RULES: RuleSet`. Adding a file adds a strategy to
`--sharding` and to every generic test.
"""

import importlib
import pkgutil

from sharding_rules import axes
from sharding_rules.rule_set import RuleSet, rule_set

__all__ = ["DEFAULT", "RuleSet", "axes", "get", "rule_set", "strategies"]

DEFAULT = "inference"  # what `--sharding=auto` is

_NOT_STRATEGIES = ("axes", "rule_set")


def strategies() -> list[str]:
    """Names of all strategies, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_STRATEGIES)


def get(name: str) -> RuleSet:
    """The strategy called `name`; ValueError listing the known ones if there is none."""
    if name not in strategies():
        raise ValueError(f"--sharding={name}: unknown sharding strategy; known: {', '.join(strategies())}")
    return importlib.import_module(f"{__name__}.{name}").RULES
