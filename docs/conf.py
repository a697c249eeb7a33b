"""The documentation's configuration: `make docs` builds it into docs/_build/html."""

from __future__ import annotations

from importlib.metadata import version as version_of

# Before autodoc does, which imports them as for a type checker: pydantic's classes cannot be made so.
import service.client  # noqa: F401

project = "AQuant Service"
release = version = version_of("aquant-service")
copyright = "the AQuant Service developers"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx.ext.napoleon"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build"]

# Headings can be linked to as on GitHub, where these pages are read as well.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
# Files of the repository that are no pages: they are linked to as on GitHub, and are not part of the site.
suppress_warnings = ["myst.xref_missing"]

# The notebook is executed by the tests; the site shows what they saw.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
napoleon_numpy_docstring = False
intersphinx_disabled_reftypes = ["*"]

html_theme = "furo"
html_title = f"AQuant Service {version}"
html_static_path = ["pictures"]
html_copy_source = False
html_show_sphinx = False
