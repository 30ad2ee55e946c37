"""Names for things a recipe can ask for: models, data sets, quantizers, tasks.

A registry is filled in two ways, and both may be used for the same one:

* ``@registry.register("resnet20")`` above a class or function;
* a table ``{name: module}`` handed to the constructor. The module is imported when the name is first asked for, and
  must register it. So one new entry costs one file and one line, and importing ``lowbit.train`` stays cheap.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")

__all__ = ["Registry", "nearest"]


def nearest(name: str, known: list[str]) -> str:
    """Say what may have been meant: ``"did you mean 'slb'? Known: float, sign, slb"``."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(sorted(known)) or '(none)'}"


class Registry(Generic[T]):
    """A table from names to objects of one kind.

    Args:
        kind: what is registered, for messages ("model", "data set", ...).
        modules: ``{name: dotted module}`` of entries that are imported when first asked for.

    Iterating gives every known name in sorted order, loaded or not.
    """

    def __init__(self, kind: str, modules: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._modules: dict[str, str] = dict(modules or {})
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[U], U]:
        """Decorator that registers its target under ``name``.

        Raises:
            ValueError: the name is taken.
        """

        def add(entry: U) -> U:
            if name in self._entries:
                raise ValueError(f"the {self.kind} {name!r} is already registered")
            expected = self._modules.get(name)
            actual = getattr(entry, "__module__", None)
            if expected is not None and actual is not None and actual != expected:
                raise ValueError(f"the {self.kind} {name!r} belongs to {expected}, {actual} may not take its name")
            self._entries[name] = entry  # type: ignore[assignment]
            return entry

        return add

    def get(self, name: str) -> T:
        """The object called ``name``.

        Raises:
            ValueError: nothing has that name; the message lists the names there are.
        """
        if name not in self._entries and name in self._modules:
            importlib.import_module(self._modules[name])
            if name not in self._entries:
                raise RuntimeError(f"{self._modules[name]} does not register the {self.kind} {name!r}")
        try:
            return self._entries[name]
        except KeyError:
            raise ValueError(f"unknown {self.kind} {name!r}: {nearest(name, self.names())}") from None

    def name_of(self, entry: object) -> str | None:
        """The name under which `entry` is registered; None where it is not."""
        return next((name for name, known in self._entries.items() if known is entry), None)

    def names(self) -> list[str]:
        """Every known name, sorted."""
        return sorted({*self._entries, *self._modules})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._modules

    def __len__(self) -> int:
        return len(self.names())
