"""The GPU programme in small on a processor: its stages run, keep what they have, and go on with it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sdworker.core.timing import machine
from sdworker.lab.bench import SECONDS
from sdworker.lab.gpu_checks import FORMATS, families, verdict
from sdworker.lab.gpu_programme import STAGES, project_requirements, reach, run
from sdworker.lab.gpu_report import Setup

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup(tmp_path) -> Setup:
    folders = {name: tmp_path / name for name in ("out", "state", "scratch")}
    return Setup(dry=True, seconds=3600, **folders)  # no part is left out, however slow the machine is


@pytest.mark.slow
def test_the_checks_run_dry_and_are_not_run_again(setup, tmp_path, capfd):
    assert run("checks", [], setup, tmp_path) == 0
    record = json.loads((setup.out / "gpu-check.json").read_text())
    verdicts = {name: verdict(part) for name, part in record["parts"].items()}
    assert record["dry"] and {name: text for name, text in verdicts.items() if text.startswith("failed")} == {}
    assert {"worker", "doctor", "memory, fraction", "refiner, offload", "switch channels last"} <= set(verdicts)
    assert not any("compile" in name for name in verdicts), "compilers run by name only"
    assert (setup.out / "embedded-float32.png").stat().st_size > 1000
    capfd.readouterr()
    assert run("checks", [], setup, tmp_path) == 0
    again = json.loads((setup.out / "gpu-check.json").read_text())
    assert again["parts"] == record["parts"] and "---- worker: from an earlier call" in capfd.readouterr().out


def test_a_stage_without_time_leaves_its_parts_out(setup, tmp_path):
    late = replace(setup, seconds=0)
    assert run("checks", ["machine", "worker"], late, tmp_path) == 0
    parts = json.loads((setup.out / "gpu-check.json").read_text())["parts"]
    assert parts and all("s needed" in part["left_out"] for part in parts.values())


@pytest.mark.slow
def test_the_families_run_on_the_device_of_the_setup(setup):
    (setup.scratch / "triton").mkdir(parents=True)  # a compiler's cache, which Python must not take for the package
    ran = families(setup, 120, ["a_class_that_diffusers"], SDWORKER_DTYPE="float32")
    assert ran["passed"] and ran["tests"] == {"PASSED": 1} and not ran["failed"], ran
    ran = families(setup, 120, ["a_class_that_diffusers"], SDWORKER_DEVICE="cuda")
    assert not ran["passed"] and len(ran["failed"]) == 1, "the tests' own settings give way to the programme's"


def test_a_record_of_a_gpu_wants_all_formats(setup):
    from sdworker.lab.gpu_checks import formats

    assert formats(Setup()) == FORMATS and formats(setup) == FORMATS[2:]


@pytest.mark.parametrize("module", ["gpu_programme", "gpu_report"])
def test_the_environment_is_made_with_the_standard_library(module):
    """On a machine whose Python lacks most packages, this code makes the environment that has them."""
    code = f"import sys, sdworker.lab.{module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    imported = {name for name in names if not name.startswith("_")} - sys.stdlib_module_names - {"sitecustomize"}
    assert imported - {"packaging"} == {"sdworker"}


def test_what_the_worker_asks_for_leads_to_all_that_a_start_imports():
    """Whatever is imported when a picture is drawn must be carried or linked, or come with the standard library."""
    from importlib.metadata import PackageNotFoundError, distribution, packages_distributions

    def of(one):
        try:
            return distribution(one.name).requires or ()
        except PackageNotFoundError:
            return ()
    code = ("import sys; from sdworker.serve.handler import handler; answer = handler({'input': {'prompt': 'a star'}});"
            "assert answer['images']; print(*{name.partition('.')[0] for name in sys.modules})")
    drawn = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    names, packages = reach(project_requirements(ROOT), of), packages_distributions()
    imported = {name: packages[name] for name in drawn[-2].split() if name in packages and name != "sdworker"}
    missing = {name for name, of in imported.items() if not {one.lower().replace("_", "-") for one in of} & names}
    assert missing <= {"defusedxml", "backports", "sniffio"}, "Pillow, httpx and httpcore do without these"


def test_every_stage_has_a_function():
    from sdworker.lab.gpu_programme import stage_function

    assert all(callable(stage_function(name)) for name in STAGES)


@pytest.mark.slow
def test_the_benchmark_is_interrupted_and_goes_on_with_what_it_has(tmp_path):
    """Interrupted as by its limit, but when a row is under way, however long that takes: its compiler never ends."""
    compiler, cut, part = tmp_path / "compiler", "switch compile: regional", tmp_path / "out/.bench-gpu-tiny.part.json"
    compiler.write_text("#!/bin/sh\nexec sleep 600\n")
    compiler.chmod(0o755)
    done = {name: {"not_used": "by another call"} for name in SECONDS if name not in ("switch channels last", cut)}
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / part.name).write_text(json.dumps({"machine": machine(), "done": done}))
    command = [sys.executable, "-m", "sdworker.lab.gpu_programme", "run", "bench", "--dry",
               *(f"--{name}={tmp_path / name}" for name in ("out", "state", "scratch"))]
    with subprocess.Popen([*command, "--seconds=3600"], cwd=tmp_path, env=os.environ | {"CXX": str(compiler)},
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert any(line.startswith(f"---- {cut}: ") for line in first.stdout)
        first.send_signal(signal.SIGINT)
    kept = json.loads(part.read_text())
    assert kept["done"] == done | {"switch channels last": kept["done"]["switch channels last"]}
    assert "psnr" in kept["done"]["switch channels last"]
    subprocess.run([*command, "--seconds=0"], cwd=tmp_path, capture_output=True)
    assert json.loads(part.read_text())["done"] == kept["done"], "the row that was cut off has not failed"
    assert not json.loads(part.read_text())["failed"] and not (tmp_path / "out" / "bench-gpu-tiny.json").exists()
