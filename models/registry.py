"""The one registry of this project: a name, what it builds, and a helpful error for a wrong name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class UnknownNameError(ValueError):
    """A name that is not registered; the message lists the names that are."""


class Registry(Generic[T]):
    """Maps command-line names to factories.

    :param kind: what the entries are, in the words of the user ("IP network"); used in error messages.

    >>> colours = Registry[str]("colour")
    >>> @colours.register("red")
    ... def red() -> str:
    ...     return "#f00"
    >>> colours.build("red")
    '#f00'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._factories: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorator that enters a factory (a function or a class) under ``name``."""

        def enter(factory: Callable[..., T]) -> Callable[..., T]:
            if name in self._factories:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._factories[name] = factory
            return factory

        return enter

    def __iter__(self) -> Iterator[str]:
        return iter(self._factories)

    def __contains__(self, name: str) -> bool:
        return name in self._factories

    def __getitem__(self, name: str) -> Callable[..., T]:
        try:
            return self._factories[name]
        except KeyError:
            known = ", ".join(self._factories)
            raise UnknownNameError(f"unknown {self.kind} {name!r}; choose from: {known}") from None

    def build(self, name: str, /, **kwargs: object) -> T:
        """Calls the factory registered under ``name``.

        :raises UnknownNameError: the name is not registered.
        """
        return self[name](**kwargs)
