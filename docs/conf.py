"""Sphinx configuration; `build.py` writes the pages and calls Sphinx."""
import configparser
from pathlib import Path

metadata = configparser.ConfigParser()
metadata.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")

project = metadata["DEFAULT"]["lib_name"]
release = version = metadata["DEFAULT"]["version"]
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton"]

nb_execution_mode = "off"  # the notebooks bring their outputs; the tests run them
nb_render_markdown_format = "gfm"  # tables in outputs
nb_merge_streams = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
maximum_signature_line_length = 72
smartquotes = False  # values in quotes stay as they are typed
toc_object_entries_show_parents = "hide"
add_module_names = False

pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#0b6e6e", "color-brand-content": "#0b6e6e",
                            "color-api-name": "#0b6e6e", "output-rule": "#d98a29", "code-font-size": "78%"},
    "dark_css_variables": {"color-brand-primary": "#5cc8c2", "color-brand-content": "#5cc8c2",
                           "color-api-name": "#5cc8c2", "output-rule": "#b97a2a"},
}
copybutton_selector = "div:not(.output) > div.highlight pre"  # code has a copy button, outputs have none
