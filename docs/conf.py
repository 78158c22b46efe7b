"""How `make docs` builds these pages; `make lint` reads them with every warning an error.

Formulas are plain text: nothing is loaded from another host, so the pages also work offline.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "deit_fast"
copyright = "deit_fast developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["plots"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = "deit_fast"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["page.css"]
pygments_style = "friendly"
pygments_dark_style = "monokai"
