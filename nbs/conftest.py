"""Lets nbval and nbdev agree on what a clean notebook is."""

import os
import re

for name in [name for name in os.environ if name.startswith(("SDWORKER_", "RUNPOD_"))]:
    if name != "SDWORKER_DATA":
        del os.environ[name]  # notebooks and tests run with default settings, whatever the shell has


def pytest_collection_modifyitems(items):
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None:
            continue
        # nbdev-clean removes execution counts and keeps outputs; nbval takes such a cell for one that was never run.
        if cell.outputs and cell.execution_count is None:
            cell.execution_count = 1
        # nbval does not know nbdev's directive for cells that are not to be run.
        if re.search(r"^#\|\s*eval:\s*false", cell.source, re.M):
            item.options["skip"] = True
