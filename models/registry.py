"""The one registry of this project: a name, what it builds, and a helpful error for a wrong name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


class UnknownNameError(ValueError):
    """A name that is not registered; the message lists the names that are."""


class Registry(Generic[T]):
    """Maps command-line names to factories.

    :param kind: what the entries are, in the words of the user ("IP network"); used in error messages.

    >>> colors = Registry[str]("color")
    >>> @colors.register("red")
    ... def red() -> str:
    ...     return "#f00"
    >>> colors.build("red")
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


def at_least(options: Any, least: int, *names: str) -> None:
    """Refuses options of a network that are too small.

    :param options: their dataclass, as it is made.
    :param names: of the options; by default all of them.
    :raises ValueError: one is less than ``least``; the message begins with its name.
    """
    for name in names or vars(options):
        if (value := getattr(options, name)) < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class NoOptions:
    """The options of a network that has none."""


class Networks(Registry["nn.Module"]):
    """Networks by name, each with its options: a frozen dataclass that stands beside the network and refuses values out
    of range when it is made, which costs nothing.

    A factory is called as ``f(options, **shape)``, or ``f(**shape)`` where the network has no options.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self._options: dict[str, type] = {}
        self._terms: dict[str, Mapping[str, float]] = {}

    def register(
        self, name: str, options: type | None = None, *, terms: Mapping[str, float] | None = None
    ) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
        """Decorator that enters a factory under ``name``.

        :param options: the dataclass of its options, all of which have defaults and a line that says what they are.
        :param terms: see :meth:`terms`.
        """
        if options is not None:
            self._options[name] = options
        self._terms[name] = terms or {}
        return super().register(name)

    def options(self, name: str) -> type[Any]:
        """The dataclass of a network's options, :class:`NoOptions` where it has none.

        :raises UnknownNameError: the name is not registered.
        """
        self[name]
        return self._options.get(name, NoOptions)

    def terms(self, name: str) -> Mapping[str, float]:
        """The losses that a network has of its own besides its main one (:class:`models.training.TrainingLoss`), with
        their fixed weights: they are known before the network is made. Empty for most.

        :raises UnknownNameError: the name is not registered.
        """
        self[name]
        return self._terms[name]

    def build(self, name: str, options: Any = None, /, **shape: object) -> nn.Module:
        """The network registered under ``name``, with fresh weights from PyTorch's global generator.

        :param options: an instance of its options; the defaults where nothing is given.
        :param shape: what the data decide (``channels`` and, by kind, ``scale``, ``num_classes``).
        :raises UnknownNameError: the name is not registered.
        :raises TypeError: the options are those of another network.
        """
        kind = self.options(name)
        if options is not None and type(options) is not kind:
            raise TypeError(f"{self.kind} {name!r} takes {kind.__name__}, not {type(options).__name__}")
        if kind is NoOptions:
            return self[name](**shape)
        return self[name](kind() if options is None else options, **shape)
