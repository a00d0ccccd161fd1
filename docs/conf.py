"""The documentation site: `make docs` builds it into `docs/_build/html`, without a network."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from docutils import nodes
from latex2mathml import converter

import tscnc_tf

project = "tscnc_tf"
author = "the tscnc_tf authors"
copyright = "the tscnc_tf authors, Apache License 2.0"
version = release = tscnc_tf.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "inventories"]
templates_path = ["_templates"]
default_role = "py:obj"  # `name` is code, and a link where there is something to link to
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

# A page for every name of every `__all__`, from the module pages that docs/api/index.md lists.
autosummary_generate = True
autosummary_imported_members = True
autosummary_ignore_module_all = False
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Reference"]

# Links to other projects are looked up in small lists beside this file: nothing is downloaded.
intersphinx_mapping = {
    "keras": ("https://keras.io/", "inventories/keras.inv"),
    "numpy": ("https://numpy.org/doc/stable/", "inventories/numpy.inv"),
    "python": ("https://docs.python.org/3/", "inventories/python.inv"),
    "tensorflow": ("https://www.tensorflow.org/", "inventories/tensorflow.inv"),
}

html_theme = "furo"
html_title = "tscnc_tf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _inline_math(translator, node):
    translator.body.append(converter.convert(node.astext()))
    raise nodes.SkipNode


def _display_math(translator, node):
    translator.body.append(converter.convert(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app):
    """Render formulas as MathML, which browsers show without scripts and without a network."""
    app.add_html_math_renderer("mathml", (_inline_math, None), (_display_math, None))
