"""What the package says of itself, in its several places. `.ci/wheel` looks at what is built of it."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

import gradprom_ext as gp

ROOT = Path(__file__).resolve().parents[1]
CITATION = (ROOT / "CITATION.cff").read_text()


def test_one_version():
    assert re.findall(r"^version: (.+)$", CITATION, re.MULTILINE) == [gp.__version__]
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    releases = [re.fullmatch(r"(\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d", heading) for heading in headings[1:]]
    assert headings[0] == "Unreleased"
    assert all(releases), f"a release is headed by its version and date: {headings}"
    if releases:
        assert releases[0][1] == gp.__version__


def test_the_version_is_that_of_the_installation():
    found = importlib.metadata.distribution("gradprom_ext")
    assert found.version == gp.__version__


def test_the_citation_is_of_the_paper_that_the_readme_names():
    (number,) = set(re.findall(r"arxiv\.org/abs/(\d+\.\d+)", CITATION))
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"GradProm \(\[arXiv:([\d.]+)\]", readme)[1] == number
    authors = re.findall(r"given-names: (.+)\n +family-names: (.+)", CITATION)
    assert authors == [("Dong", "Zhang"), ("Kwang-Ting", "Cheng")]


@pytest.mark.parametrize("name", ["gradprom-doctor", "gradprom-bench"])
def test_commands_lead_to_a_function(name):
    entries = re.findall(rf'^{name} = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    ((module, function),) = entries
    assert callable(getattr(importlib.import_module(module), function))


def test_types_are_shipped():
    """The marker, and the stub of the one module without annotations of its own."""
    package = Path(gp.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_C.pyi").is_file()
