"""The documentation, built by Sphinx: it reads the docstrings themselves, checks every reference and runs examples.

``make docs`` needs no network: formulas are text, fonts and scripts come with the theme, and numbers and pictures are
made while it builds, from the code and from ``benchmarks/results``.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "benchmarks"), str(HERE / "_ext")]

import murf_fast  # noqa: E402

project = "murf_fast"
author = "the murf_fast authors"
copyright = "the murf_fast authors, Apache License 2.0"
release = version = murf_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "docstrings",
    "generated",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext", "_static"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = True  # a name in a docstring that leads nowhere is an error of `make docs`
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

autodoc_typehints = "none"  # signatures would not fit, and the docstrings say shapes and dtypes
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_param = False  # "mode, antialias: ..." is two arguments, which fields have no place for

doctest_global_setup = "import torch, murf_fast; _ = torch.manual_seed(0)"
doctest_test_doctest_blocks = ""  # only blocks that say so

html_theme = "furo"
html_title = "murf_fast"
html_static_path = ["_static"]
html_css_files = ["murf_fast.css"]
html_show_sourcelink = False
html_copy_source = False
