"""Every message that the sources raise or warn with, as the page on trouble-shooting lists them.

The sources are read, not run: a message that no test provokes is found too. Values that a message names are shown as
an ellipsis, as a person who searches the page has other ones.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_WARNINGS = ("warnings.warn", "logger.warning", "parser.error")
_SHAPED = re.compile(r"%[sdr]")
_CPP = re.compile(r"throw (?:py::(\w+)|std::(\w+))\((.*?)\);[ }]*$", re.DOTALL | re.MULTILINE)
_PYBIND = {"type_error": "TypeError", "value_error": "ValueError", "runtime_error": "RuntimeError"}


class Message(NamedTuple):
    """What a person may read.

    :param file: where it comes from, relative to the repository.
    :param kind: the class of the exception, or ``warning``.
    :param text: an ellipsis stands for every value.
    """

    file: str
    kind: str
    text: str


def messages(*folders: str) -> list[Message]:
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
    return [each for each in found if re.search(r"\w\w", each.text)]


def _of_python(file: str, source: str) -> Iterator[Message]:
    """
    >>> list(_of_python("a.py", "raise ValueError(f'lr is {lr}, ' 'not a number')"))
    [Message(file='a.py', kind='ValueError', text='lr is …, not a number')]
    >>> list(_of_python("a.py", "logger.warning('%s is full', disk)"))[0].text
    '… is full'
    """
    nodes = sorted((node for node in ast.walk(ast.parse(source)) if hasattr(node, "lineno")), key=lambda n: n.lineno)
    for node in nodes:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call, kind = node.exc, ast.unparse(node.exc.func).split(".")[-1].lstrip("_")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _WARNINGS:
            call, kind = node, "error" if node.func.attr == "error" else "warning"  # type: ignore[attr-defined]
        else:
            continue
        if call.args:
            for text in _texts(call.args[0]):
                yield Message(file, kind, _tidy(text))


def _texts(node: ast.expr) -> list[str]:
    """What an expression may say; several texts where it chooses between them."""
    if isinstance(node, ast.Constant):
        return [_SHAPED.sub("…", str(node.value))]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)]  # type: ignore[misc]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _texts(node.left) for right in _texts(node.right)]
    if isinstance(node, ast.IfExp):
        return _texts(node.body) + _texts(node.orelse)
    return ["…"]


def _of_cpp(file: str, source: str) -> Iterator[Message]:
    """
    >>> list(_of_cpp("a.cpp", 'throw py::value_error(name() + " is on " + device(t) + ", not there");'))[0].text
    '… is on …, not there'
    """
    for match in _CPP.finditer(source):
        kind, argument = match[1] or match[2], match[3]
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
