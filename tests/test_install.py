"""The wheel works in a fresh virtual environment, outside the checkout."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left behind in the checkout."""
    where = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "sdworker", where / "source" / "sdworker", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, where / "source")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", where, where / "source"],
                   check=True, capture_output=True)
    return next(where.glob("*.whl"))


def test_wheel_holds_package_and_model_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "sdworker/embedded_model/unet/diffusion_pytorch_model.safetensors" in names
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
    where = subprocess.run([python, "-c", "import sdworker; print(sdworker.__file__)"], cwd=tmp_path,
                           check=True, capture_output=True, text=True).stdout
    assert str(home) in where, "the wheel's package, not the checkout's"
    command = [home / "bin" / "sdworker", "generate", "a large red star on a blue background", "--json"]
    done = subprocess.run([*command, "-o", tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["images"][0]["path"]).exists()
