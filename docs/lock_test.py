"""Install exactly what the image locks, and see that the worker works with it: `make lock-test`.

`.runpod/worker.lock` goes into an environment of its own in `out/lock/`, some 5 GB to fetch. There the worker draws at
a local queue by diffusers and by ahead-of-time code, the tests of families and add-ons run, and imports are timed.
The results go to `results/lock.json` with the hash of the lock; a test fails when the two no longer belong together.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from sdworker.core.timing import psnr, write_result
from sdworker.embedded.shapes import judge
from sdworker.lab.queue_server import run_workers
from sdworker.serve.image_io import from_data_uri

ROOT = Path(__file__).resolve().parent.parent
LOCK, TOOLS_LOCK, HOME = ROOT / ".runpod" / "worker.lock", ROOT / ".runpod" / "tests.lock", ROOT / "out" / "lock"
PYTHON, TOOLS, TORCHVISION, AOT = HOME / "venv/bin/python", HOME / "tools", HOME / "torchvision", HOME / "aot"
FOR_TESTS = ("pytest", "pytest-timeout", "pytest-xdist", "execnet", "pluggy", "iniconfig", "torchao")  # of tests.lock
TESTS = ("families", "addons", "lean", "noise")
PROMPT = "a large red star on a blue background"
IMPORT = """
import sys, time
from sdworker.start.fast_imports import complete_torch_import, fast_import_mode
complete_torch_import()
start = time.perf_counter()
with fast_import_mode(keep=sys.argv[1:]):
    from diffusers import StableDiffusionXLPipeline
print(time.perf_counter() - start)
"""
VERSIONS = """
import json, torch
from sdworker.core.timing import machine
print(json.dumps(machine() | {"cuda": torch.version.cuda}))
"""


def python_path(path: tuple[Path, ...]) -> str:
    "PYTHONPATH with the repository's package first."
    return os.pathsep.join(map(str, (ROOT, *path)))


def run(*command: object, path: tuple[Path, ...] = (), **environment: str) -> str:
    "Run a command in the repository with its package on the path; returns its output."
    variables = {"PYTHONPATH": python_path(path), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([str(word) for word in command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          env=os.environ | variables)
    if done.returncode:
        sys.exit(f"{done.stdout}\ndocs/lock_test.py: {' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


def pip(*arguments: object) -> None:
    "Install wheels and nothing that they ask for."
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:",
        *arguments)


def install(lock: str) -> dict[str, Any]:
    "Make the environment, unless it exists and is of this lock; returns seconds and bytes."
    made, recipe = HOME / "installed.json", {"sha256": lock, "tools": TOOLS_LOCK.read_text()}
    if made.exists() and (before := json.loads(made.read_text())) | recipe == before:
        return before
    shutil.rmtree(HOME, ignore_errors=True)
    begin = time.perf_counter()
    run(sys.executable, "-m", "venv", HOME / "venv")
    pip("--require-hashes", "-r", LOCK)
    seconds = time.perf_counter() - begin
    lines = TOOLS_LOCK.read_text().splitlines(keepends=True)
    (HOME / "tools.txt").write_text("".join(line for line in lines if line.partition("==")[0] in FOR_TESTS))
    pip("--require-hashes", "--target", TOOLS, "-r", HOME / "tools.txt")
    minor = re.search(r"^torch==2\.(\d+)\.", LOCK.read_text(), re.M)[1]
    pip("--target", TORCHVISION, f"torchvision==0.{int(minor) + 15}.0")  # numbered so since torch 2.0
    size = sum(path.stat().st_size for path in (HOME / "venv").rglob("*") if path.is_file())
    record = recipe | {"seconds": round(seconds, 1), "bytes": size}
    made.write_text(json.dumps(record))
    return record


def draw(what: str, path: tuple[Path, ...] = (), says: str = "", **environment: str) -> tuple[dict[str, Any], Any]:
    "Start the worker with two jobs at the queue and check both pictures; returns its warnings and its first picture."
    print(f"drawing: {what}", flush=True)
    jobs = [{"id": f"job-{seed}", "input": {"prompt": PROMPT, "seed": seed}} for seed in (7, 8)]
    worker_run = run_workers([str(PYTHON), "-W", "ignore", "-m", "sdworker.cli.main", "start"], jobs,
                             {"PYTHONPATH": python_path(path), "SDWORKER_AOT_DIR": str(AOT)} | environment, 300)
    answers = [worker_run.answers.get(job["id"], {}).get("output", {}) for job in jobs]
    pictures = [from_data_uri(answer["images"][0]) for answer in answers if "images" in answer]
    right = len(pictures) == 2 and all(all(judge(picture, PROMPT).values()) for picture in pictures)
    if not right or says not in worker_run.log:
        sys.exit(f"{worker_run.log}\ndocs/lock_test.py: {what} did not draw what was asked for, or did not "
                 f"log {says!r}")
    return {"warnings": answers[0]["warnings"]}, pictures[0]


def compile_ahead() -> float:
    "Compile the embedded model ahead of time; returns the seconds."
    print("compiling the embedded model ahead of time", flush=True)
    shutil.rmtree(AOT, ignore_errors=True)
    begin = time.perf_counter()
    run(PYTHON, "-W", "ignore", "-m", "sdworker.cli.main", "bake", "--aot", "--device", "cpu",
        SDWORKER_AOT_DIR=str(AOT))
    return time.perf_counter() - begin


def import_xformers() -> dict[str, float]:
    "Time the imports of drawing without and with xformers, in turns; returns the medians in seconds."
    print("timing imports", flush=True)
    turns = [[float(run(PYTHON, "-W", "ignore", "-c", IMPORT, *keep).split()[-1]) for keep in ((), ("xformers",))]
             for _ in range(6)][1:]
    hidden, seen = (statistics.median(column) for column in zip(*turns, strict=True))
    return {"hidden": hidden, "in_sight": seen, "ratio": hidden / seen}


def test() -> str:
    "Run the tests; returns pytest's last line."
    print("running the tests of " + ", ".join(TESTS), flush=True)
    output = run(PYTHON, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-n", "2", "--timeout=600",
                 *(ROOT / "tests" / f"test_{name}.py" for name in TESTS), path=(TOOLS,))
    return output.strip().splitlines()[-1]


def main() -> None:
    "Run all steps, and write the record."
    installed, version = sysconfig.get_python_version(), re.search(r"CPython (\S+)", LOCK.read_text())[1]
    if installed != version:
        sys.exit(f"docs/lock_test.py: worker.lock needs Python {version}, and .venv has {installed}; remove .venv and "
                 f"run `make PYTHON=python{version} lock-test`.")
    for name in [name for name in os.environ if name.startswith(("SDWORKER_", "RUNPOD_"))]:
        del os.environ[name]  # the worker's own defaults are tried
    lock = sha256(LOCK.read_bytes()).hexdigest()
    print("installing the lock: some 5 GB to fetch, unless it is there", flush=True)
    made = install(lock)
    seconds = compile_ahead()
    workers, pictures = {}, {}
    for what, options in {
            "diffusers": {"SDWORKER_ENGINE": "diffusers"}, "ahead of time": {"SDWORKER_ENGINE": "aot"},
            "profile guide": {"SDWORKER_PROFILE": "guide", "says": "Loading model..."},
            "SDWORKER_LEAN=off": {"SDWORKER_ENGINE": "diffusers", "SDWORKER_LEAN": "off"},
            "torchvision beside it": {"SDWORKER_ENGINE": "diffusers", "path": (TORCHVISION,)}}.items():
        workers[what], pictures[what] = draw(what, **options)
    apart = {what: min(psnr(picture, pictures["diffusers"]), 99.0) for what, picture in pictures.items()}
    if min(apart.values()) < 40:
        sys.exit(f"docs/lock_test.py: pictures lie {apart} dB from diffusers' own; at least 40 are needed")
    write_result(ROOT / "results" / "lock.json", {
        "sha256": lock, "machine": json.loads(run(PYTHON, "-c", VERSIONS)),
        "installed": {name: made[name] for name in ("seconds", "bytes")},
        "compiled_ahead": seconds, "workers": workers, "psnr": apart, "import_diffusers": import_xformers(),
        "tests": {"of": TESTS, "result": test()}},
        "make lock-test: the locked packages on a processor, the embedded model, at a local queue")
    print("all of it works: results/lock.json")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # which takes --help, and nothing else
    main()
