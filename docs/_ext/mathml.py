"""Formulas as MathML: the site then needs neither a network nor JavaScript for them."""

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def _mathml(tex: str, display: str) -> str:
    """The formula, with the space after a function's name that the converter leaves out."""
    spaced = re.sub(r"\\(log|exp|max|min)(?=\s+[\\\w])", r"\\\1\\,", tex)
    braced = re.sub(r"\\mathcal (\w)", r"\\mathcal{\1}", spaced)
    return convert(braced, display=display).replace(">&#x0007E;<", ">&#x0223C;<")


def _inline(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.Element) -> None:
    formula = _mathml(node.astext(), "block")
    translator.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer, which ``html_math_renderer`` of conf.py names."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
