"""Lock what the container image installs: `python docs/lock.py` makes `.runpod/worker.lock` and `.runpod/tests.lock`.

uv resolves settings.ini for the image's platform; of each package the one wheel that pip would choose there is kept,
with its hash, its size and what it unpacks to. `tests.lock` has what the tests need and the worker does not.
"""
import argparse
import io
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import httpx
from packaging.pylock import Package, PackageWheel, Pylock
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
PYTHON, PLATFORM = "3.11", "x86_64-manylinux_2_28"
COMPILE = ["--no-config", "pip", "compile", "-", "--quiet", "--format", "pylock.toml", "--only-binary", ":all:",
           "--python-version", PYTHON, "--python-platform", PLATFORM]
MADE = f"# made by docs/lock.py from settings.ini: the wheels of CPython {PYTHON} on {PLATFORM}\n"
MARKERS = {"implementation_name": "cpython", "platform_python_implementation": "CPython", "python_version": PYTHON,
           "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "platform_system": "Linux",
           "platform_machine": "x86_64", "os_name": "posix"}
OLD = {17: ["manylinux2014_x86_64"], 12: ["manylinux2010_x86_64"], 5: ["manylinux1_x86_64"]}  # glibc 2.x, as once named
ARCHS = [tag for minor in range(28, 4, -1) for tag in (f"manylinux_2_{minor}_x86_64", *OLD.get(minor, []))]
TAGS = [*cpython_tags((3, 11), platforms=ARCHS), *compatible_tags((3, 11), "cp311", ARCHS)]  # best first, as in pip
Choice = tuple[Package, PackageWheel]


def resolve(requirements: list[str], *options: str) -> list[Choice]:
    "The packages that the image needs, by name, each with its wheel."
    uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"] if find_spec("uv") else None
    if not uv:
        sys.exit("docs/lock.py resolves with uv: python -m pip install uv")
    done = subprocess.run([*uv, *COMPILE, *options], input="\n".join(requirements), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("docs/lock.py: uv has no answer; what it says is above")
    lock = tomllib.loads(done.stdout)
    for package in lock["packages"]:  # among equal tags the first is chosen: let it be the newest build
        package["wheels"].sort(key=lambda wheel: parse_wheel_filename(wheel["url"].rpartition("/")[2])[2], reverse=True)
    return sorted(Pylock.from_dict(lock).select(environment=MARKERS, tags=TAGS), key=lambda choice: choice[0].name)


def unpacked(http: httpx.Client, wheel: PackageWheel) -> int:
    "The size of a wheel's unpacked files, in bytes. Only its end is fetched, where they are listed."
    for tail in (2**16, 2**24):
        with http.stream("GET", wheel.url, headers={"Range": f"bytes={max(0, wheel.size - tail)}-"}) as answer:
            if answer.status_code != 206:  # or all of it would come
                sys.exit(f"docs/lock.py: no part of {wheel.filename} to be had, status {answer.status_code}")
            end = io.BytesIO(answer.read())
        try:
            return sum(file.file_size for file in ZipFile(end).infolist())
        except BadZipFile:  # the list is longer than that
            continue
    sys.exit(f"docs/lock.py: {wheel.filename} does not list its files")


def write(path: Path, choices: list[Choice]) -> Path:
    "Write a lock beside its place; returns the temporary file."
    with httpx.Client(follow_redirects=True, timeout=60) as http:
        lines = [f"{package.name}=={package.version} --hash=sha256:{wheel.hashes['sha256']}"
                 f"  # {wheel.size} bytes, unpacked {unpacked(http, wheel)}\n"
                 for package, wheel in track(choices, path.name, console=Console(stderr=True))]
    part = path.with_suffix(".lock.part")
    part.write_text(MADE + "".join(lines), encoding="utf-8")
    return part


def main() -> None:
    "Make both locks; neither is put in place before both are written."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    ours, gpu, notebooks, dev = (settings["DEFAULT"][f"{name}requirements"].split()
                                 for name in ("", "gpu_", "notebooks_", "dev_"))
    worker, tests = ROOT / ".runpod/worker.lock", ROOT / ".runpod/tests.lock"
    choices = resolve(ours + gpu)
    names = {package.name for package, _ in choices}
    part = write(worker, choices)
    more = resolve([*notebooks, *dev, "setuptools"], "--constraints", str(part))
    write(tests, [choice for choice in more if choice[0].name not in names]).replace(tests)
    part.replace(worker)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # which takes --help, and nothing else
    main()
