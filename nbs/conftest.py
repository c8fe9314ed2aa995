"""Lets nbval and nbdev agree on what a clean notebook is, and gives notebooks an AOT package to draw with."""

import os
import re
import shutil
from pathlib import Path

import pytest

for name in [name for name in os.environ if name.startswith(("SDWORKER_", "RUNPOD_"))]:
    if name != "SDWORKER_DATA":
        del os.environ[name]  # notebooks and tests run with default settings, whatever the shell has
os.environ["SDWORKER_AOT_DIR"] = str(Path(__file__).parent.parent / "out" / "no-aot")  # nor what it has compiled


COMPILING = ("2_engine/14_torch_compile", "8_lab/07_break_even")  # what they show cannot be had without a compiler
SLOW = (*COMPILING, "7_embedded/02_training", "8_lab/01_quality", "8_lab/04_coldstart", "8_lab/05_bench",
        "8_lab/08_plan_vs_real", "8_lab/10_gpu_checks",
        "8_lab/11_gpu_headline")  # training, quality and benchmarks in small, and the GPU programme, dry


def pytest_collection_modifyitems(items):
    packages = list(Path(__file__).parent.parent.glob("out/aot/*/aot.json"))
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
        name = str(item.parent.path.relative_to(Path(__file__).parent).with_suffix(""))
        with_package = "../out/aot" in item.parent.path.read_text(encoding="utf-8")
        if with_package or name in SLOW:
            item.add_marker(pytest.mark.slow)
        if with_package and not packages:
            item.add_marker(pytest.mark.skip(reason="there is no AOT package; `make aot` makes one with g++"))
        if name in COMPILING and not shutil.which(os.environ.get("CXX", "g++")):
            item.add_marker(pytest.mark.skip(reason="there is no C++ compiler"))
