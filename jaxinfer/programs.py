"""What to compile, described before anything is traced, so that a program which was compiled before can be found."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A function of arrays whose shapes, dtypes and shardings are known.

    Attributes:
      name: which function.
      settings: all that it depends on beside its arguments and this package's source; equal for equal ones.
      function: pure.
      arguments: abstract, with shardings.
      outputs: the shardings of what it returns, one for each array.
      donated: which of the arguments it takes over.
    """

    name: str
    settings: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    outputs: Any
    donated: tuple[int, ...] = ()

    def lower(self) -> jax.stages.Lowered:
        """Traces it."""
        jitted = jax.jit(self.function, donate_argnums=self.donated, out_shardings=self.outputs)
        return jitted.lower(*self.arguments)

    @property
    def devices(self) -> list[jax.Device]:
        """That it runs on, in the order of its mesh."""
        return [*jax.tree.leaves(self.outputs)[0].mesh.devices.flat]

    @property
    def structures(self) -> tuple[jax.tree_util.PyTreeDef, jax.tree_util.PyTreeDef]:
        """Of what it takes, positional and by name, and of what it returns."""
        return jax.tree.structure((self.arguments, {})), jax.tree.structure(self.outputs)

    @property
    def description(self) -> list[Any]:
        """Equal for programs that do the same, as far as JSON can tell."""
        arrays = [f"{array.dtype.name}{array.shape}" for array in jax.tree.leaves(self.arguments)]
        return [self.name, self.settings, arrays, self.donated, *map(str, self.structures)]
