"""Mathematics as MathML, which browsers draw themselves: the pages need neither a network nor a copy of MathJax."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

_logger = logging.getLogger(__name__)


def inline(translator: Any, node: nodes.math) -> None:
    """Visitor of Sphinx's HTML writer, for mathematics in a line."""
    translator.body.append(_drawn(node, as_block=False))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    """Visitor of Sphinx's HTML writer, for a formula of its own."""
    translator.body.append(f'<div class="formula">{_drawn(node, as_block=True)}</div>')
    raise nodes.SkipNode


def _drawn(node: nodes.Element, *, as_block: bool) -> str:
    try:
        return str(tex2mathml(node.astext(), as_block=as_block))
    except MathError as error:
        _logger.warning("%s in the formula %s", error, node.astext(), location=node)
        return ""
