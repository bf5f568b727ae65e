"""A sharding strategy as data: one row per logical axis."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from sharding_rules import axes as ax


@dataclasses.dataclass(frozen=True)
class RuleSet:
    """Where each logical axis goes.

    Attributes:
      name: the strategy's name, as `--sharding` spells it.
      rules: logical axis -> the mesh axes that split it, in order; () leaves it whole. Every logical
        axis must have a row, so that nothing is replicated by omission.
    """

    name: str
    rules: Mapping[str, tuple[str, ...]]

    def __post_init__(self):
        rules = dict(self.rules)
        if missing := [axis for axis in ax.LOGICAL_AXES if axis not in rules]:
            raise ValueError(f"sharding strategy {self.name!r} has no rule for {missing}")
        if unknown := [axis for axis in rules if axis not in ax.LOGICAL_AXES]:
            raise ValueError(
                f"sharding strategy {self.name!r} names unknown logical axes {unknown}; known: {ax.LOGICAL_AXES}"
            )
        if unknown := sorted({m for ms in rules.values() for m in ms} - set(ax.MESH_AXES)):
            raise ValueError(
                f"sharding strategy {self.name!r} names unknown mesh axes {unknown}; known: {ax.MESH_AXES}"
            )
        object.__setattr__(self, "rules", MappingProxyType(rules))

    def __hash__(self):
        return hash((self.name, tuple(sorted(self.rules.items()))))

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """The mesh axes that at least one rule uses, in mesh order."""
        used = {mesh_axis for mesh_axes in self.rules.values() for mesh_axis in mesh_axes}
        return tuple(axis for axis in ax.MESH_AXES if axis in used)


def rule_set(name: str, **splits: str | tuple[str, ...]) -> RuleSet:
    """A `RuleSet` from the rows that split something; all other logical axes stay whole.

    `rule_set("tensor_parallel", heads="tensor")` splits heads over tensor and nothing else.
    """
    rules: dict[str, tuple[str, ...]] = dict.fromkeys(ax.LOGICAL_AXES, ())
    for axis, mesh_axes in splits.items():
        rules[axis] = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    return RuleSet(name, rules)
