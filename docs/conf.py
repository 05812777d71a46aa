from importlib.metadata import version as installed_version
from typing import Any

from docutils.nodes import Element, SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

project = "emerging-optimizers"
author = "the emerging-optimizers contributors"
copyright = f"2026, {author}"
release = version = installed_version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3  # so that a link to a heading of another page works, as it does where Markdown is shown
exclude_patterns = ["_build"]

# A reference that leads nowhere is a warning, but for those to what these pages do not document.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(collections|dist|torch)\..+|DeviceMesh|ProcessGroup|Tensor"),
    ("py:class", r"emerging_optimizers\.(health\.monitor\.ScalarWriter|soap\.state\.Layout)"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # autodoc lists the fields of a NamedTuple itself

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wrap.css"]
html_title = f"{project} {release}"


# MathML, which browsers draw themselves: no script, no fonts, no network.
html_math_renderer = "mathml"


def inline_math(writer: Any, node: Element) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise SkipNode


def block_math(writer: Any, node: Element) -> None:
    writer.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
