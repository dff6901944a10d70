"""Every message that the sources raise or warn with, as the page on trouble-shooting lists them.

The sources are read, not run: a message that no test provokes is found too. Values that a message names are shown as
an ellipsis, as a person who searches the page has other ones.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from docs.builder import ROOT

_WARNINGS = ("warnings.warn", "logger.warning", "parser.error")
_SHAPED = re.compile(r"%[sdr]")
_CPP = re.compile(r"throw (?:py::|std::)?(\w+)\((.*?)\);[ }]*$", re.DOTALL | re.MULTILINE)
_PYBIND = {
    "type_error": "TypeError",
    "value_error": "ValueError",
    "runtime_error": "RuntimeError",
    "ParametersMoved": "ValueError",
}


class Message(NamedTuple):
    """What a person may read.

    :param file: where it comes from, relative to the repository.
    :param kind: the class of the exception, or ``warning``.
    :param text: an ellipsis stands for every value.
    """

    file: str
    kind: str
    text: str


@functools.cache
def messages(*folders: str) -> tuple[Message, ...]:
    """All messages of the files below some folders of the repository, in the order of the files and their lines, each
    once. One that is nothing but a value (an error that is handed on) is left out."""
    found: dict[Message, None] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            file = path.relative_to(ROOT).as_posix()
            if path.suffix == ".py":
                found |= dict.fromkeys(_of_python(file, path.read_text()))
            elif path.suffix in (".cpp", ".cu", ".cuh", ".h"):
                found |= dict.fromkeys(_of_cpp(file, path.read_text()))
    return tuple(each for each in found if re.search(r"\w\w", each.text))


def _of_python(file: str, source: str) -> Iterator[Message]:
    """
    >>> list(_of_python("a.py", "raise ValueError(f'lr is {lr}, ' 'not a number')"))
    [Message(file='a.py', kind='ValueError', text='lr is …, not a number')]
    >>> list(_of_python("a.py", "logger.warning('%s is full', disk)"))[0].text
    '… is full'
    >>> source = "def f(x): return f'{x} differs'" + chr(10) + "if said := f(1): raise RunError(said)"
    >>> list(_of_python("a.py", source))[0].text
    '… differs'
    """
    nodes = [node for node in ast.walk(ast.parse(source)) if hasattr(node, "lineno")]
    said = _Said(nodes)
    for node in sorted(nodes, key=lambda node: node.lineno):
        if isinstance(node, ast.Raise | ast.Return) and isinstance(call := _value(node), ast.Call):
            kind = ast.unparse(call.func).split(".")[-1]
            # A function that makes an error raises it elsewhere.
            if isinstance(node, ast.Return) and not kind.endswith("Error"):
                continue
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _WARNINGS:
            call, kind = node, "error" if ast.unparse(node.func).endswith("error") else "warning"
        else:
            continue
        if call.args:
            for text in said.by(call.args[0]):
                yield Message(file, kind, _tidy(text))


def _value(node: ast.Raise | ast.Return) -> ast.expr | None:
    return node.exc if isinstance(node, ast.Raise) else node.value


class _Said:
    """What the expressions of a file may say, followed through its own functions and variables."""

    def __init__(self, nodes: list[ast.AST]) -> None:
        self._values: dict[str, list[ast.expr]] = {}
        for node in nodes:
            if isinstance(node, ast.FunctionDef):
                returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
                self._values.setdefault(node.name, []).extend(returned)
            elif isinstance(node, ast.NamedExpr):
                self._values.setdefault(node.target.id, []).append(node.value)

    def by(self, node: ast.expr, depth: int = 2) -> list[str]:
        """Several texts where it chooses between them; an ellipsis where nothing is known."""
        if isinstance(node, ast.Constant):
            return [_SHAPED.sub("…", str(node.value))]
        if isinstance(node, ast.JoinedStr):
            return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [left + right for left in self.by(node.left) for right in self.by(node.right)]
        if isinstance(node, ast.IfExp):
            return self.by(node.body) + self.by(node.orelse)
        name = node.func if isinstance(node, ast.Call) else node
        if depth and isinstance(name, ast.Name) and name.id in self._values:
            return [text for value in self._values[name.id] for text in self.by(value, depth - 1)]
        return ["…"]


def _of_cpp(file: str, source: str) -> Iterator[Message]:
    """
    >>> list(_of_cpp("a.cpp", 'throw py::value_error(name() + " is on " + device(t) + ", not there");'))[0].text
    '… is on …, not there'
    """
    for match in _CPP.finditer(source):
        kind, argument = match[1], match[2]
        if kind not in _PYBIND:
            continue
        text, rest = "", argument
        for part in re.finditer(r'((?:[^"])*?)"((?:[^"\\]|\\.)*)"', argument, re.DOTALL):
            between = part[1].strip().strip("+").strip()
            # A string behind a comma is an argument of a call, whose result is a value.
            said = "" if between.endswith(",") else part[2].replace('\\"', '"')
            text += ("…" if between not in ("", "std::string(") else "") + said
            rest = argument[part.end() :]
        text += "…" if rest.strip(" )+\n") else ""
        yield Message(file, _PYBIND[kind], _tidy(text))


def _tidy(text: str) -> str:
    return re.sub(r"(… ?)+…", "…", " ".join(text.split()))
