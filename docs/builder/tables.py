"""What the pages say of registries and command lines: read from these, in Markdown, and never retyped.

A page asks for it with a line ``<!-- generated: recipes -->``, which GitHub does not show.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from docs.builder import ROOT

WIDTH = 92
"""Characters in a line of what a command prints."""
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?([^`]+)`")
_LINK = re.compile(r"`([^`<]+) <([^`>]+)>`_")


class Command(NamedTuple):
    """Something that is typed as ``python -m MODULE``."""

    module: str
    about: str
    has_help: bool


def command_modules() -> list[Command]:
    """Every module of the library and of ``train/`` that is run, the library's last."""
    return [each for folder in ("train", "gradprom_ext") for each in _commands(ROOT / folder)]


def _commands(folder: Path) -> Iterator[Command]:
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__main__.py")]):
        tree = ast.parse(path.read_text())
        main = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"), None)
        if main is None or "__main__" not in path.read_text():
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        # One that takes no arguments has nothing to explain.
        yield Command(module, ast.get_docstring(tree) or "", bool(main.args.args))


def commands() -> str:
    """A section for each command: what it is for, and what ``--help`` prints."""
    parts = []
    for module, about, has_help in command_modules():
        shown = f"\n\n```text\n{_help(module)}\n```" if has_help else ""
        parts.append(f"## `python -m {module}`\n\n{plain(about)}{shown}")
    return "\n\n".join(parts)


def _help(module: str) -> str:
    env = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "dumb", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], env=env, cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    # What is the same for every command over runs stands once: what a run is, and its flags, as a table.
    text = done.stdout.partition("\n\nusage:")[0].partition("\n╭─")[0].strip()
    return "\n\n".join(map(_wrapped, text.split("\n\n")))


def _wrapped(paragraph: str) -> str:
    """A paragraph of words in lines that fit on a page; one in columns as it is."""
    if "\n " in paragraph or paragraph[0] == " ":
        return paragraph
    return textwrap.fill(paragraph, WIDTH, break_on_hyphens=False)


def settings() -> str:
    """A table of flags for each section of a run's settings, with the values of both presets."""
    from train.settings.presets import preset_settings
    from train.settings.sections import SECTIONS, flag

    quick, paper = (preset_settings(preset).values for preset in ("quick", "paper"))
    parts = []
    for name, kind in SECTIONS.items():
        rows = [
            (f"`{flag(each.name)}`", each.metadata["help"], _value(quick[each.name]), _value(paper[each.name]))
            for each in dataclasses.fields(kind)
            if not each.name.endswith("_options")
        ]
        heading = f"### {name.capitalize()}\n\n{first_paragraph(kind)}\n\n"
        parts.append(heading + table(("flag", "meaning", "quick", "paper"), rows))
    return "\n\n".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_value, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def strategies() -> str:
    """A table: the names of ``--strategy``, and what is done to theta (the parameters of IP) and phi (those of VR)."""
    from train.strategies import STRATEGIES, strategy_class

    rows = [(f"`{name}`", first_paragraph(strategy_class(name))) for name in STRATEGIES]
    return table(("`--strategy`", "what a step does"), rows)


def degradations() -> str:
    """A table: what ``--task`` may be, what then happens to an image, and what undoes it without a network."""
    from train.degradations import DEGRADATIONS, parse
    from train.degradations.parsing import ALIASES

    rows, folded = [], []
    for name in DEGRADATIONS:
        kind: Any = DEGRADATIONS[name]
        arguments = [each.name.upper() for each in dataclasses.fields(kind) if each.init]
        written = f"{name}:{','.join(arguments)}" if arguments else name
        rows.append((f"`{name}`", first_paragraph(kind), kind.remedy or "none"))
        folded.append(f"`{written}`, by default `{DEGRADATIONS.build(name)}`\n{_definition(kind)}")
    named = [(f"`{name}`", f"`{parse(name)}`" if name != "none" else "nothing: the images are poor as they are")
             for name in ALIASES]  # fmt: skip
    return (
        table(("`--task`", "what happens", "classical remedy"), rows)
        + "\n\n<details><summary>Each with its arguments, and whose it is</summary>\n\n"
        + "\n\n".join(folded)
        + "\n\n</details>\n\nNames for what is often wanted:\n\n"
        + table(("`--task`", "the same as"), named)
    )


def _definition(thing: object) -> str:
    """What a docstring says, as the definition of a term: its paragraphs, and its parameters as a list."""
    text, *fields = re.split(r"^:(?=param|raises)", inspect.getdoc(thing) or "", flags=re.MULTILINE)
    parts = [plain(" ".join(paragraph.split())) for paragraph in text.strip().split("\n\n")]
    for each in fields:
        name, _, about = " ".join(each.split()).removeprefix("param ").partition(": ")
        if not name.startswith("raises"):
            parts.append(f"**{name.upper()}**: {plain(about)}")
    return ": " + "\n\n  ".join(parts)


def networks() -> str:
    """A table for each role: the names of its networks, what they are, and their options with their defaults."""
    from train.settings.sections import NETWORKS

    parts = []
    for key, registry in NETWORKS.items():
        rows = []
        for name in registry:
            options = [f"`--{key}.{each} {value}`: {about}" for each, value, about in _options(registry.options(name))]
            rows.append((f"`{name}`", first_paragraph(registry[name]), "<br>".join(options) or "none"))
        parts.append(f"### `--{key}`: {registry.kind}\n\n" + table(("name", "what it is", "options"), rows))
    return "\n\n".join(parts)


def _options(kind: type[Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, default and meaning of each option; the meaning is the string below the field."""
    fields = dataclasses.fields(kind)
    if not fields:
        return
    [tree] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    told: dict[str, str] = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_text:
            told[node.target.id] = plain(str(after.value.value))  # type: ignore[union-attr]
    for each in fields:
        yield each.name.replace("_", "-"), _value(each.default), told.get(each.name, "")


def data_sets() -> str:
    """A table: the names of ``--dataset``, what the sets are, and where a person gets them."""
    from train.data.base import DATASETS
    from train.data.sets import __all__ as files

    assert files  # which registers them
    rows = []
    for name in DATASETS:
        data = DATASETS.build(name)
        module = sys.modules[type(data).__module__]
        about = plain((module.__doc__ or "").split("\n\n")[0].removesuffix("::").rstrip(":"))
        where = f"<{data.homepage}>" if data.homepage else "your own"
        rows.append((f"`{name}`", about, where, "yes" if data.has_phantoms else "no"))
    return table(("`--dataset`", "what it is", "from", "phantoms"), rows)


def recipes() -> str:
    """A table: the names of ``--recipe``, the question of each, and how many runs answer it."""
    from train.recipes import RECIPES

    rows = []
    for name in RECIPES:
        recipe = RECIPES.build(name)
        arms = "; ".join(arm.name for arm in recipe.arms[:12]) + ("; …" if len(recipe.arms) > 12 else "")
        rows.append((f"`{name}`", recipe.title, recipe.question, arms, str(len(recipe.seeds))))
    return table(("`--recipe`", "on what", "question", "arms", "seeds"), rows)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table.

    >>> print(table(("a", "b"), [("1", "x|y")]))
    | a | b |
    | --- | --- |
    | 1 | x\\|y |
    """
    names = list(header)
    written = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [names, ["---"] * len(names), *written]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def first_paragraph(thing: object) -> str:
    """The first paragraph of a docstring, in Markdown."""
    return plain((inspect.getdoc(thing) or "").split("\n\n")[0])


def plain(text: str) -> str:
    """reStructuredText of docstrings as Markdown: roles become code, links stay links.

    >>> plain("See :class:`~a.b.C` and `it <https://x.org>`_, ``d``.")
    'See `C` and [it](https://x.org), ``d``.'
    """
    return _ROLE.sub(r"`\1`", _LINK.sub(r"[\1](\2)", " ".join(text.split()) if "\n\n" not in text else text))


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "settings": settings,
    "strategies": strategies,
    "degradations": degradations,
    "networks": networks,
    "data sets": data_sets,
    "recipes": recipes,
}
