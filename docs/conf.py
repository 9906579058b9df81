"""Sphinx: ``make docs``. The site needs no network, neither to be built nor to be read: formulas
are MathML, which browsers show by themselves, and no font, script or picture is another's."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils.nodes import SkipNode, math, math_block
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import imcl_fast  # noqa: E402

project = "imcl_fast"
copyright = "2026, the imcl_fast authors"
version = release = imcl_fast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"imcl_fast {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
autodoc_typehints = "none"  # the signature has them, and the docstring the shapes
autodoc_member_order = "bysource"
napoleon_use_rtype = False


# The bars of a norm are no operators, with space around them, and a logarithm is one.
SPACED = {
    '<mo stretchy="false">&#x0007C;</mo>': '<mo stretchy="false" lspace="0" rspace="0">|</mo>',
    "<mi>log</mi>": '<mo lspace=".17em" rspace=".17em">log</mo>',
}


def _mathml(node: math | math_block, display: str) -> str:
    text = convert(node.astext(), display=display)
    for made, wanted in SPACED.items():
        text = text.replace(made, wanted)
    return text


def _inline(self, node: math) -> None:
    self.body.append(_mathml(node, "inline"))
    raise SkipNode


def _block(self, node: math_block) -> None:
    self.body.append(f'<div class="formula">{_mathml(node, "block")}</div>')
    raise SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
