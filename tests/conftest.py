"""Tests run with default settings, whatever the shell has."""

import os
from pathlib import Path

for name in [name for name in os.environ if name.startswith(("SDWORKER_", "RUNPOD_"))]:
    if name != "SDWORKER_DATA":
        del os.environ[name]
os.environ["SDWORKER_AOT_DIR"] = str(Path(__file__).parent.parent / "out" / "no-aot")

LONGEST = ("test_aot", "test_switches", "test_compile", "test_families", "test_samplers", "test_addons",
           "test_gpu_programme", "test_gate", "test_gpu_headline", "test_site")


def pytest_collection_modifyitems(items):
    """Begin with the files that take minutes, so that no process is left alone with one in the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
