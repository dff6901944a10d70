"""How Sphinx builds the pages: ``make docs``.

The source folder is the whole repository, so that every Markdown file in it is a page where it is, README and results
too, and a link between them is the same on GitHub and in the built pages, and is checked.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sphinx.errors import ExtensionError  # noqa: E402

from docs.builder import mathml, pages  # noqa: E402
from gradprom_ext.version import __version__  # noqa: E402

project = "gradprom_ext"
release = version = __version__

root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "results/*.md", "results/*/*.md", "benchmarks/*.md", "examples/*.md"]
exclude_patterns = [".*", "build", "runs", "wheels", "results-of"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]

# Every cross-reference is to something on these pages; what PyTorch and Python own is not, as looking it up would need
# a network.
nitpicky = True
_FOREIGN = (
    r"(torch|gradprom_ext\.plan|ProcessGroup|Tensor|OneOrSeveral|Backend|collections|typing|optional|np|numpy)\b.*"
)
nitpick_ignore_regex = [(r"py:.*", _FOREIGN), (r"py:class", r"[a-z_ ]+")]
suppress_warnings = [
    "myst.header",  # a page of results may begin below a heading that is elsewhere
]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"gradprom_ext {version}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_extra_path = ["extra"]  # leads from the folder of the pages to the first of them
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False

# make links: other sites are asked whether the page is there, not for a place in it.
linkcheck_timeout = 20
linkcheck_anchors = False


def read(app: Any, name: str, source: list[str]) -> None:
    """What Sphinx parses in the place of a file."""
    source[0] = pages.expand(source[0])
    if name.startswith("results/") and name != "results/README":
        source[0] = "---\norphan: true\n---\n" + source[0]  # linked from results/README, in no table of contents


_FETCHED = re.compile(r"""<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//[^"]*""")


def finished(app: Any, error: Exception | None) -> None:
    """Refuses pages that would fetch something: they are to be read from a disk, without a network."""
    if error is not None or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        if fetched := _FETCHED.search(path.read_text()):
            raise ExtensionError(f"{path} fetches {fetched[0]}")


def setup(app: Any) -> None:
    """Registers what Sphinx does not have."""
    app.add_html_math_renderer("mathml", (mathml.inline, None), (mathml.block, None))
    app.connect("source-read", read)
    app.connect("build-finished", finished)
