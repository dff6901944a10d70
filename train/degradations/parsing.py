"""How a command line writes a degradation, or several, and what is said about one that it cannot mean."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, get_type_hints

from train.degradations.base import DEGRADATIONS, Degradation
from train.degradations.blur import Blur
from train.degradations.chain import Chain
from train.degradations.downsample import Downsample
from train.degradations.gaussian import Gaussian
from train.degradations.kspace import KSpace
from train.degradations.poisson import Poisson
from train.degradations.untouched import Untouched
from train.errors import RunError

# The paper's mixture of Gaussian noise, Poisson noise and Gaussian blur, in the order in which they happen: optics
# blur, a detector counts photons, its electronics add noise when they are read out. The paper gives no numbers. These
# are chosen so that no part hides another: the point spread function is 2.4 px wide at half its height, and the noise
# of a medium gray has a standard deviation of 0.11 (Poisson's 0.10 and 0.05), near the 0.1 of `denoise`.
MIXTURE = Chain((Blur(1.0), Poisson(50.0), Gaussian(0.05)))

# What tasks are called besides the degradations' own names; sigma is that of --sigma.
ALIASES: dict[str, Callable[[float | None], Degradation]] = {
    "denoise": lambda sigma: Gaussian() if sigma is None else Gaussian(sigma),
    "sr2": lambda sigma: Downsample(2),
    "sr3": lambda sigma: Downsample(3),
    "sr4": lambda sigma: Downsample(4),
    "mixture": lambda sigma: MIXTURE,
    "kspace2": lambda sigma: KSpace(2),
    "kspace4": lambda sigma: KSpace(4),
    "joint2": lambda sigma: KSpace(2, 4.0),
    "joint4": lambda sigma: KSpace(4, 4.0),
    "none": lambda sigma: Untouched(),
}
_ALIAS_HINTS = {
    "denoise": "its noise is that of --sigma; write gaussian:SIGMA to give it here",
    **dict.fromkeys(("sr2", "sr3", "sr4"), "write downsample:FACTOR for another factor"),
    "mixture": f"it is {MIXTURE}; write that with other numbers",
    **{
        name: f"it is {made(None)}; write that with other numbers"
        for name, made in ALIASES.items()
        if name.startswith(("kspace", "joint"))
    },
    "none": "it does nothing",
}
# A plus sign joins parts, but not the 1e+3 of a number.
_PLUS = re.compile(r"\+(?!\d)")


def parse(text: str, *, sigma: float | None = None) -> Degradation:
    """Reads a degradation or a chain: ``NAME`` or ``NAME:ARGUMENT,...``, joined by ``+``.

    Names are those of ``DEGRADATIONS``, and ``denoise`` (Gaussian noise of ``sigma``), ``sr2``, ``sr3``, ``sr4``,
    ``mixture``, ``kspace2``, ``kspace4`` (the middle of k-space), ``joint2``, ``joint4`` (the same, undersampled) and
    ``none``. An argument that is left out has its default; that of Gaussian noise is ``sigma``.

    :param text: ``"gaussian:0.1"``, ``"poisson:30+blur:1.5"``; what ``str`` makes of a degradation is read back
        exactly.
    :param sigma: noise of ``denoise`` and of a ``gaussian`` without an argument; 0.1 by default.
    :raises RunError: a name or an argument is not understood; the message names the part and what exists.
    """
    parts = [_part(part.strip(), text, sigma) for part in _PLUS.split(text)]
    if len(parts) > 1 and not all(part.has_truth for part in parts):
        raise RunError(f"--task {text}: none does nothing, and stands alone; leave it out")
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def choices() -> list[str]:
    """Every name that :func:`parse` knows, with its arguments: ``denoise``, ``gaussian:SIGMA`` ...; and what a chain
    with a name of its own is: ``mixture (blur:1+...)``."""
    named = [f"{name} ({MIXTURE})" if name == "mixture" else name for name in ALIASES]
    written = [
        f"{name}:{','.join(each.upper() for each in _arguments(name))}" if _arguments(name) else name
        for name in DEGRADATIONS
    ]
    return [*named, *written]


def _arguments(name: str) -> dict[str, type]:
    """The arguments of a registered degradation, in their order, with their types."""
    kind: Any = DEGRADATIONS[name]
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _part(part: str, text: str, sigma: float | None) -> Degradation:
    where = f"--task {text}" if part == text else f"--task {text}: {part!r}"
    name, colon, given = part.partition(":")
    known = f"choose from: {', '.join(choices())}; join several with +"
    if not part:
        raise RunError(f"--task {text!r} has an empty part; {known}")
    if name in ALIASES:
        if colon:
            raise RunError(f"{where}: {name} takes no argument; {_ALIAS_HINTS[name]}")
        return ALIASES[name](sigma)
    if name not in DEGRADATIONS:
        raise RunError(f"{where}: unknown degradation {name!r}; {known}")
    arguments = _arguments(name)
    form = f"{name}:{','.join(each.upper() for each in arguments)}"
    values: dict[str, Any] = {"sigma": sigma} if name == "gaussian" and sigma is not None else {}
    words = given.split(",") if colon else []
    if len(words) > len(arguments):
        raise RunError(f"{where}: {name} takes {len(arguments)} argument(s), not {len(words)}; write {form}")
    for argument, word in zip(arguments, words, strict=False):
        kind = arguments[argument]
        try:
            values[argument] = kind(word)
        except ValueError:
            wanted = "an integer" if kind is int else "a number"
            raise RunError(f"{where}: {argument} must be {wanted}, not {word!r}; write {form}") from None
    try:
        return DEGRADATIONS.build(name, **values)
    except ValueError as error:
        raise RunError(f"{where}: {error}") from None
