"""Package metadata from settings.ini; everything else is in pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
meta = parser["DEFAULT"]
extras = {name: meta[f"{name}_requirements"].split() for name in ("gpu", "quantize", "notebooks", "docs", "dev")}

setup(
    name=meta["lib_name"],
    version=meta["version"],
    description=meta["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=meta["author"],
    license=meta["license"],
    keywords=meta["keywords"],
    python_requires=f">={meta['min_python']}",
    install_requires=meta["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": meta["console_scripts"].split()},
    packages=find_packages(include=["sdworker*"]),
    package_data={"sdworker.embedded": ["model/**/*"]},
)
