"""The wheel works in a fresh virtual environment, outside the checkout."""

import ast
import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from sdworker.embedded.shapes import judge

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no file is left in the checkout."""
    where = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "sdworker", where / "source" / "sdworker", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, where / "source")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", where, where / "source"],
                   check=True, capture_output=True)
    return next(where.glob("*.whl"))


def test_wheel_holds_package_and_model_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "sdworker/embedded/model/unet/diffusion_pytorch_model.safetensors" in names
    assert not [name for name in names if name.startswith(("nbs/", "tests/", "docs/"))]


def test_fresh_environment_draws(wheel, tmp_path):
    """Only sdworker is installed anew; its dependencies are lent by path, so that no network is needed."""
    home = tmp_path / "fresh venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                               check=True, capture_output=True, text=True).stdout.strip())
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    start = ("import json, sdworker.cli.main, sdworker.serve.handler; "
             "from sdworker.start.fast_imports import import_runpod, uncompiled; "
             "import_runpod(); print(json.dumps(uncompiled()))")
    done = subprocess.run([python, "-c", start], cwd=tmp_path, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
                          check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [], "an install without .pyc files compiles everything at each cold start"
    where = subprocess.run([python, "-c", "import sdworker; print(sdworker.__file__)"], cwd=tmp_path,
                           check=True, capture_output=True, text=True).stdout
    assert str(home) in where, "the wheel's package, not the checkout's"
    command = [home / "bin" / "sdworker", "generate", "a large red star on a blue background", "--seed", "7", "--json"]
    done = subprocess.run([*command, "-o", tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(judge(Image.open(json.loads(done.stdout)["images"][0]["path"]), command[2]).values())


def test_every_import_is_a_declared_dependency(wheel):
    """The environment above would hide a forgotten one."""
    imported = set()
    for path in (ROOT / "sdworker").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            imported |= {name.split(".")[0] for name in names}
    metadata = zipfile.ZipFile(wheel).read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA")))
    declared = {line.split(": ")[1] for line in metadata.decode().splitlines()
                if line.startswith("Requires-Dist") and "extra ==" not in line}
    provides = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "pynvml": "nvidia-ml-py"}
    declared = {re.match(r"[\w-]+", line)[0].replace("_", "-") for line in declared}
    declared |= {"matplotlib", "torchmetrics", "torchao"}  # of extras, which their users name
    needed = {provides.get(name, name).replace("_", "-") for name in imported - sys.stdlib_module_names - {"sdworker"}}
    assert needed <= declared, f"not in settings.ini: {needed - declared}"


@pytest.mark.parametrize(("lock", "sets"), [("worker", ("", "gpu_")), ("tests", ("notebooks_", "dev_"))])
def test_locks_fit_the_requirements(lock, sets):
    """`make lock` renews them."""
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    files = [ROOT / ".runpod" / f"{name}.lock" for name in ("worker", lock)]  # the tests' lock comes on top
    lines = [line for file in files for line in file.read_text().splitlines()[1:]]
    pattern = re.compile(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}  # \d+ bytes, unpacked \d+")
    assert all(pattern.fullmatch(line) for line in lines)
    locked = dict(line.split(" ")[0].split("==") for line in lines)
    for part in sets:
        for requirement in map(Requirement, settings["DEFAULT"][f"{part}requirements"].split()):
            assert locked[canonicalize_name(requirement.name)] in requirement.specifier, f"{requirement} is not locked"


def test_the_lock_is_tried_with_its_own_python_only(monkeypatch):
    spec = importlib.util.spec_from_file_location("lock_test", ROOT / "docs" / "lock_test.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(module, "install", lambda lock: pytest.fail("pip would refuse the lock, after a download"))
    monkeypatch.setattr("sysconfig.get_python_version", lambda: "3.12")
    with pytest.raises(SystemExit, match=r"needs Python 3\.11, and \.venv has 3\.12; .* `make PYTHON=python3\.11 lock"):
        module.main()
