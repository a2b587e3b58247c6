"""The settings of the site: ``make docs`` builds it into build/site."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import pyro_vae  # noqa: E402

project, author, release = "pyro_vae", "The authors of pyro_vae", pyro_vae.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "api",
    "mathml",
]
exclude_patterns = ["_ext"]

# Warnings are errors, and each reference must have a target. The only names without one are those
# of other libraries: their inventories are on the network, and a build needs none.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|pyro|numpy|np|pandas|matplotlib|arviz|sklearn|collections|pathlib)\..*"),
    # The same, and parts of hints, where a hint is quoted.
    (r"py:class", r"Tensor|Dataset|DataLoader|DiskArray|Figure|Axes|dict\[str"),
    (r"py:class", r"pyro_vae\.pairs\.inner_plates\.Program"),  # a type variable
]

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the tests run the notebooks
nb_custom_formats = {".nb.md": ["jupytext.reads", {"fmt": "md:myst"}]}

default_role = "name"
autodoc_inherit_docstrings = False  # those of torch's methods say nothing about ours
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
pygments_style, pygments_dark_style = "friendly", "github-dark"
html_title = f"pyro_vae {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"
