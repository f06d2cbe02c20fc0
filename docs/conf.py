"""Sphinx: the pages of docs/ as a site. `make docs` writes it to build/docs, and fails at a link that leads nowhere."""

project = "lightning-async-localsgd"
html_title = project
extensions = ["myst_parser"]
html_theme = "furo"
highlight_language = "python"  # of indented code
myst_heading_anchors = 4  # as GitHub makes them
