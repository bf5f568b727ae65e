"""Sharding strategies: one file each, found by name.

A strategy is a module in this folder with a `RULES: RuleSet`. Adding a file adds a strategy to
`--sharding` and to every generic test.
"""

import importlib
import pkgutil

from sharding_rules import axes
from sharding_rules.rule_set import RuleSet, rule_set

__all__ = ["RuleSet", "axes", "get", "rule_set", "strategies", "strategy_for"]

_NOT_STRATEGIES = ("axes", "rule_set")


def strategies() -> list[str]:
    """Names of all strategies, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_STRATEGIES)


def get(name: str) -> RuleSet:
    """The strategy called `name`; ValueError listing the known ones if there is none."""
    if name not in strategies():
        raise ValueError(f"--sharding={name}: unknown sharding strategy; known: {', '.join(strategies())}")
    return importlib.import_module(f"{__name__}.{name}").RULES


def strategy_for(mesh_axes: tuple[str, ...]) -> RuleSet:
    """The strategy that uses exactly `mesh_axes` (the mesh's axes of size above one).

    Raises ValueError with the legal combinations when no strategy covers them, and with the names when several do:
    which is better is for whoever has two to say.
    """
    all_rules = [get(name) for name in strategies()]
    wanted = tuple(axis for axis in axes.MESH_AXES if axis in mesh_axes)
    fitting = [rules for rules in all_rules if rules.mesh_axes == wanted]
    if len(fitting) == 1:
        return fitting[0]
    split = " and ".join(wanted) or "nothing"
    if fitting:
        names = " or ".join(f"--sharding={rules.name}" for rules in fitting)
        raise ValueError(f"--sharding=auto: several strategies split over {split}; use {names}")
    legal = "; ".join(" and ".join(used) or "one device" for used in sorted({rules.mesh_axes for rules in all_rules}))
    raise ValueError(f"--mesh: no sharding strategy splits over {split} together; legal: {legal}")
