"""Tests run with default settings, whatever the shell has."""

import os
from pathlib import Path

import pytest

for name in [name for name in os.environ if name.startswith(("SDWORKER_", "RUNPOD_"))]:
    if name != "SDWORKER_DATA":
        del os.environ[name]
os.environ["SDWORKER_CAPSULES"] = str(Path(__file__).parent.parent / "out" / "no-capsules")


@pytest.fixture
def patient() -> str:
    """Code of a worker whose job "later" is drawn when nothing is compiled any more, however long that takes."""
    return """
import threading, sdworker.handler
answer = sdworker.handler.handler
def patiently(job):
    for thread in threading.enumerate():
        if thread.name == "compile" and job["id"] == "later":
            thread.join()
    return answer(job)
sdworker.handler.handler = patiently
sdworker.handler.start()
"""
