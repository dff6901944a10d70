"""The pages of docs/: their examples run, their commands can be read, and nothing is missing from them.

Links and cross-references are checked where the pages are built (``make docs``).
"""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import gradprom_ext as gp
from docs import why
from docs.builder import messages, pages, tables
from docs.builder.messages import Message
from tests.markdown import ROOT, blocks, commands, languages
from train.data.base import DATASETS
from train.degradations import DEGRADATIONS
from train.recipes import RECIPES
from train.settings.sections import FIELDS, NETWORKS, flag
from train.strategies import STRATEGIES

PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_COMMANDS = [*PAGES, ROOT / "results" / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "README.md"]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = messages.messages(*pages.SOURCES)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ----------------------------------------------------------------------------------------------------------------------
# Code


def test_blocks_are_of_a_known_kind():
    assert {kind for page in PAGES for kind in languages(page)} <= {"python", "pycon", "bash", "text"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples(page):
    """The sessions of a page are one session, as a reader follows them from top to bottom."""
    session = "\n".join(blocks(page, "pycon"))
    example = doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(verbose=False)
    said: list[str] = []
    runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("module", [messages, pages, tables], ids=lambda module: module.__name__)
def test_examples_of_what_builds_the_pages(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def read_as(module: str, arguments: list[str]) -> None:
    """Reads a command line as its command does, and does not do what it asks."""
    command = importlib.import_module("gradprom_ext.bench.__main__" if module == "gradprom_ext.bench" else module)
    if module == "train.run":
        command.parse(arguments)
    elif module == "train.compare":
        given = command.arguments(arguments)
        assert given.list or given.recipe in RECIPES
    elif module == "train.pretrain":
        command.settings_of(arguments)
    elif module == "train.probe":
        command.arguments(arguments)
    elif module == "gradprom_ext.bench":
        command._parser().parse_args(arguments)
    else:
        assert any(module == each.module for each in tables.command_modules()), f"there is no {module}"


@pytest.mark.parametrize(
    ("module", "arguments"),
    sorted({(words[0], tuple(words[1:])) for page in WITH_COMMANDS for words in commands(page)}),
    ids=lambda part: part if isinstance(part, str) else " ".join(part)[:40],
)
def test_commands_can_be_read(module, arguments):
    if "latest" not in arguments:  # there is no run to be resumed
        read_as(module, list(arguments))


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is missing


@pytest.mark.parametrize("name", gp.__all__)
def test_every_public_name_is_in_the_reference_with_an_example(name):
    page = (ROOT / "docs" / "reference.md").read_text()
    assert re.search(rf"^\.\. (?:auto\w+|py:data):: {name}$", page, flags=re.MULTILINE)
    told = page if name == "__version__" else getattr(gp, name).__doc__
    assert re.search(rf">>> .*\b(?:gp\.{name}\b|NonFinite|stats)|nonfinite=", told)


REGISTRIES = [STRATEGIES, DEGRADATIONS, DATASETS, RECIPES, *NETWORKS.values()]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_everything_registered_is_on_the_page_of_experiments(registry):
    page = pages.expand((ROOT / "docs" / "experiments.md").read_text())
    assert list(registry)
    assert not [name for name in registry if not re.search(rf"^\| `{name}[`:]", page, flags=re.MULTILINE)]


def test_every_command_and_flag_is_on_the_page_of_commands(monkeypatch):
    monkeypatch.setattr(tables, "_help", lambda module: f"usage: python -m {module}")
    page = pages.expand((ROOT / "docs" / "commands.md").read_text())
    for name in ("train.run", "train.compare", "train.pretrain", "train.probe", "gradprom_ext.bench"):
        assert f"## `python -m {name}`" in page
        assert f"usage: python -m {name}\n" in page
    assert "## `python -m gradprom_ext.doctor`" in page
    assert not [name for name in FIELDS if not name.endswith("_options") and f"| `{flag(name)}` |" not in page]


def test_the_help_of_a_command_is_its_own():
    text = tables._help("train.compare")
    assert text.startswith("usage: python -m train.compare")
    assert "show what would be run" in text
    text = tables._help("train.pretrain")
    assert "--method" in text
    assert "--dataset" not in text  # is in the table of flags


def test_every_message_has_an_entry():
    assert [str(each) for each in pages.without_entry(TROUBLE, MESSAGES)] == []


def test_no_entry_is_of_a_message_that_is_gone():
    entries = pages.entries(TROUBLE)
    assert [entry for entry in entries if not any(pages.is_about(entry, each) for each in MESSAGES)] == []
    pages.expand(TROUBLE)  # raises where a list would be empty


def test_what_the_doctor_says_is_what_it_says():
    told = (ROOT / "gradprom_ext" / "doctor.py").read_text() + (ROOT / "gradprom_ext" / "backends.py").read_text()
    rows = TROUBLE.partition("| the doctor says |")[2].partition("\n\n")[0].splitlines()[2:]
    said = [part.strip() for row in rows for part in row.split("|")[1].split("…")]
    assert "run the tests" in said
    assert not [part for part in said if part not in told]


def test_messages_are_found_where_they_are():
    """Some that a person typed here after reading the sources: one of each way in which they are written."""
    for each in (
        Message("gradprom_ext/settings.py", "ValueError", "aux_weight has … entries for … auxiliary gradients"),
        Message("gradprom_ext/_step.py", "NonFiniteGradientError", "…; nothing was updated"),
        Message("train/compare.py", "error", "give --recipe NAME, or --list to see which there are"),
        Message("train/data/cache.py", "warning", "the image cache … is rebuilt: …"),
        Message("train/data/__init__.py", "DataError", "--data-root …: there is no such folder"),
        Message(
            "train/training/step_log.py",
            "RunError",
            "the step log … is damaged at line …: …; restore it, or start a new run",
        ),
        Message("csrc/python/plan.cpp", "ValueError", "the parameters of a plan must be on one device"),
    ):
        assert each in MESSAGES


# ----------------------------------------------------------------------------------------------------------------------
# The picture


def test_the_picture_shows_what_the_table_of_results_says(tmp_path):
    """Against the table beside the JSON file: the difference to IP alone has two digits there."""
    table = (ROOT / "results" / "lambda" / "table.md").read_text()
    told = {
        cells[0]: float(cells[7])
        for cells in ([cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines())
        if " @ " in cells[0]
    }
    curves = why.curves()
    for strategy, name in why.CURVES.items():
        assert [(weight, round(loss, 2)) for weight, loss in curves[name]] == [
            (weight, told[f"{strategy} @ {weight:g}"]) for weight in (0.001, 0.01, 0.1, 1.0)
        ]
    for arm, name in why.CAPPED.items():
        assert [(weight, round(loss, 2)) for weight, loss in curves[name]] == [(1.0, told[arm])]
    why.main(tmp_path / "why.svg")
    assert (tmp_path / "why.svg").read_text().startswith("<?xml")
