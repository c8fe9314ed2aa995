"""A worker's fast imports with libraries that the stubs do not expect."""

import os
from pathlib import Path

import numpy as np
import pytest
from handled import handled, pixels

TORCHVISION = """
import sys
from types import ModuleType
from unittest.mock import MagicMock

__version__ = "0.99.0"

class Part(ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)

for name in ("transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional", "io"):
    sys.modules[f"torchvision.{name}"] = Part(f"torchvision.{name}")
from torchvision import transforms, io
"""
NEEDS = {  # what its import needs of the compiler
    "a submodule": "from torch._dynamo.utils import is_compile_supported",
    "the package": "import torch._dynamo; torch._dynamo.config.suppress_errors",
    "what a stub has otherwise": "import torch._dynamo; torch._dynamo.eval_frame.OptimizedModule.mro()",
}


def installed(folder: Path, name: str, code: str) -> str:
    "Install a made-up package of this name and code; the path to find it on."
    package, metadata = folder / name, folder / f"{name}-0.99.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(code)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.99.0\n")
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    "The picture of a worker that has no such library."
    answers, log = handled("embedded", {"one": {}})
    assert "stubs" not in log
    return pixels(answers["one"])[0]


@pytest.mark.parametrize("needs", NEEDS)
def test_a_library_that_imports_the_compiler_changes_no_picture(needs, tmp_path, plain):
    answers, log = handled("embedded", {"one": {}}, PYTHONPATH=installed(
        tmp_path, "torchvision", f"import torch\n{NEEDS[needs]}\n{TORCHVISION}"))
    assert np.array_equal(pixels(answers["one"])[0], plain) and answers["one"]["warnings"] == []
    tried_again = "an import failed with stubs" in log and "SDWORKER_LEAN=off" in log
    assert tried_again == (needs == "what a stub has otherwise"), log


def test_lean_can_be_switched_off(plain):
    answers, log = handled("embedded", {"one": {}}, SDWORKER_LEAN="off")
    assert np.array_equal(pixels(answers["one"])[0], plain)
    assert "torch._dynamo" in log and "torch._dynamo" not in handled("embedded", {"one": {}})[1]


def test_xformers_is_imported_only_where_attention_names_it(tmp_path):
    path = installed(tmp_path, "xformers", "")
    (tmp_path / "xformers" / "ops.py").write_text("")
    for attention, imported in ("sdpa", False), ("xformers", True):
        answers, log = handled("embedded", {"one": {}}, PYTHONPATH=path, SDWORKER_ATTENTION=attention)
        assert answers["one"]["images"] and ("xformers" in log.rpartition("imported:")[2]) == imported, log
