"""Tests run with default settings, whatever the shell has."""

import os
from pathlib import Path

for name in [name for name in os.environ if name.startswith(("SDWORKER_", "RUNPOD_"))]:
    if name != "SDWORKER_DATA":
        del os.environ[name]
os.environ["SDWORKER_AOT_DIR"] = str(Path(__file__).parent.parent / "out" / "no-aot")
