"""The docs site builds from the notebooks that are here; Sphinx's warnings are errors."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_site_builds_with_a_page_for_each_notebook():
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(ROOT / "_docs").with_suffix("") for path in (ROOT / "_docs").rglob("*.html")}
    notebooks = {path.relative_to(ROOT / "nbs").with_suffix("") for path in (ROOT / "nbs").rglob("[!.]*.ipynb")
                 if ".ipynb_checkpoints" not in path.parts}
    assert notebooks <= pages
