"""Which of an operation's backends runs: the one that is asked for, or the first that can of those preferred."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import jax

# By platform, but for xla, which can run anything. Where nothing was measured yet, what is expected to be fastest.
_PREFERRED = {"gpu": ("triton",), "cpu": ("cpu",)}


class Choice(NamedTuple):
    """A backend, and of each that is preferred to it why it cannot."""

    name: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name} cannot: {reason}" for name, reason in self.passed_over.items())
        return f"{self.name} ({reasons})" if reasons else self.name


@dataclasses.dataclass(frozen=True)
class Backends:
    """The modules of an operation's folder. Each has `unsupported(spec, device) -> str | None`: why it cannot run that.

    Attributes:
      folder: the package.
      flag: what a user names one of them with.
      parts: modules of the folder that several backends are made of; those of one have its name before theirs, as
        `triton_kernel` has.
    """

    folder: str
    flag: str
    parts: tuple[str, ...]

    def names(self) -> list[str]:
        """Of all backends, sorted."""
        modules = pkgutil.iter_modules(importlib.import_module(self.folder).__path__)
        names = {module.name for module in modules} - {*self.parts}
        return sorted(name for name in names if not any(name.startswith(f"{other}_") for other in names))

    def load(self, name: str, *specs: Any, device: jax.Device | None = None) -> ModuleType:
        """The backend called `name`; ValueError if there is none, or if it cannot run one of `specs`, saying why."""
        if name not in self.names():
            raise ValueError(f"--{self.flag}={name}: no such backend; known: auto, {', '.join(self.names())}")
        module = self._module(name)
        if reason := _why_not(module, specs, device):
            raise ValueError(f"--{self.flag}={name}: {reason}")
        return module

    def choose(self, specs: Iterable[Any], device: jax.Device) -> Choice:
        """The backend preferred on `device` of those that can run all `specs`."""
        specs, passed_over = tuple(specs), {}
        for name in [name for name in _PREFERRED.get(device.platform, ()) if name in self.names()]:
            reason = _why_not(self._module(name), specs, device)
            if reason is None:
                return Choice(name, passed_over)
            passed_over[name] = reason
        return Choice("xla", passed_over)

    def resolve(self, name: str, specs: Iterable[Any], device: jax.Device) -> Choice:
        """What the flag asks for, "auto" decided; ValueError where that cannot."""
        if name == "auto":
            return self.choose(specs, device)
        self.load(name, *specs, device=device)
        return Choice(name, {})

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.folder}.{name}")


def _why_not(module: ModuleType, specs: Iterable[Any], device: jax.Device | None) -> str | None:
    return next(filter(None, (module.unsupported(spec, device) for spec in specs)), None)
