"""The documentation site: `make docs` builds it into `docs/_build/html`, without a network."""

from __future__ import annotations

import inspect
import os
import re

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
smartquotes_action = "De"  # dashes and ellipses; in x', the quote is a prime
default_role = "py:obj"  # `name` is code, and a link where there is something to link to
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

# A page for every name of every `__all__`, from the module pages that docs/api/index.md lists.
autosummary_generate = True
autosummary_imported_members = True
autosummary_ignore_module_all = False
autosummary_context = {"promoted": tscnc_tf.__all__}  # indexed at the top, and not once more
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
    "tensorflow": ("https://www.tensorflow.org/", "inventories/tensorflow.inv"),
}

html_theme = "furo"
html_title = "tscnc_tf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


_APART = r'\1<mspace width="0.17em"/>'


def _math(display):
    def visit(translator, node):
        formula = converter.convert(node.astext(), display=display)
        # A function and its argument are set apart: log x, and not logx.
        apart = re.sub(r"(<m[io]>(?:log|det|max|min|cos)</m[io]>)(?=<m[^o])", _APART, formula)
        translator.body.append(apart)
        raise nodes.SkipNode

    return visit, None


def _public_names():
    """Return the full name of each public object by its own name, if that is distinctive."""
    names = {}
    for module in filter(inspect.ismodule, (getattr(tscnc_tf, name) for name in tscnc_tf.__all__)):
        for name in module.__all__:
            if name[0].isupper() or "_" in name:
                names[name] = f"{module.__name__}.{name}"
    return names | {name: f"tscnc_tf.{name}" for name in tscnc_tf.__all__}


def _short_name(app, env, node, contnode):
    """Link names that are not written in full: `pruning.compact`, `tscnc.prune`, `PGD`."""
    name = node.get("reftarget", "").removeprefix("tscnc.").removeprefix("tscnc_tf.")
    family, _, last = name.rpartition(".")
    families = ("", "evaluation", "export", "pruning", "training")
    at_the_top = last in tscnc_tf.__all__ and family in families
    target = PUBLIC.get(last) if at_the_top or not family else f"tscnc_tf.{name}"
    if target is None:
        return None
    python = env.domains.python_domain
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


PUBLIC = _public_names()


def setup(app):
    """Render formulas as MathML, which browsers show without scripts and without a network."""
    app.add_html_math_renderer("mathml", _math("inline"), _math("block"))
    app.connect("missing-reference", _short_name)
