"""The GPU programme's stages of speed and starts: dry on a processor, and the tables that wait for their records."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from sdworker.aot.engine import find_aot_package
from sdworker.core.model_info import EMBEDDED, read_json, read_model_info
from sdworker.lab import gpu_headline
from sdworker.lab.bench import table, unused
from sdworker.lab.gpu_checks import checks_table
from sdworker.lab.gpu_headline import headline, headline_table, way_in_process
from sdworker.lab.gpu_report import Setup
from sdworker.lab.gpu_starts import aot_table, measure_aot, measure_starts, start, starts_table

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup(tmp_path) -> Setup:
    return Setup(dry=True, out=tmp_path / "out", state=tmp_path / "state", scratch=tmp_path / "scratch")


@pytest.fixture
def compiled(setup) -> Setup:
    """A setup that has the embedded model compiled ahead of time."""
    folder, _ = find_aot_package(read_model_info(EMBEDDED), "cpu", "float32", [ROOT / "out" / "aot"])
    if not folder:
        pytest.skip("there is no AOT package; `make aot` makes one with g++")
    shutil.copytree(folder, setup.scratch / "aot" / folder.name)
    return setup


@pytest.mark.slow
def test_ways_run_in_processes_and_a_later_call_goes_on(setup):
    parts = ("rates", "operations", "eager", "CUDA graph", "compiled by blocks")
    report = headline(setup, parts)
    assert report.failed() == ["CUDA graph"] and "needs a CUDA device" in report.parts["CUDA graph"]["error"]
    for way in ("eager", "compiled by blocks"):
        assert report.parts[way]["result"]["dB"]["latents"] > 60, way
    record = read_json(setup.out / "headline-dry.json")
    shown = headline_table(record)
    assert record["gpu"]["name"] in shown and "figures mean nothing" in shown
    assert re.search(r"\| compiled by blocks \| \d", shown)
    (setup.out / "headline.json").rename(setup.out.parent / "headline.json")
    later = Setup(dry=True, out=setup.out / "later", state=setup.out.parent, scratch=setup.scratch, seconds=0)
    again = headline(later)
    assert again.parts["eager"] == report.parts["eager"] and "left_out" in again.parts["fused QKV"]
    assert set(read_json(later.out / "headline-dry.json")["ways"]) == {"eager", "compiled by blocks"}


def test_a_way_is_ended_at_its_limit(setup, monkeypatch):
    monkeypatch.setitem(gpu_headline.WAYS, "eager", 0.1)
    with pytest.raises(ChildProcessError, match="killed after"):
        way_in_process("eager", setup)


def test_a_start_is_ended_at_its_limit():
    with pytest.raises(ChildProcessError, match="no answer in 1 s"):
        start(([sys.executable, "-c", "import time; time.sleep(60)"], {}), {"prompt": "x"}, [], 1)


@pytest.mark.slow
def test_compiled_code_is_measured_dry(compiled):
    report = measure_aot(compiled, ("aot", "naive", "import torch", "images", "compile"))
    assert not report.failed(), report.parts
    record = read_json(compiled.out / "aot-dry.json")
    assert record["starts"]["aot"]["rows"]["total"] > 0 and record["images"]["images"]["4"]["ratio"] > 0
    assert record["compile"]["backend"] == "eager" and record["compile"]["first_call"] > 0
    shown = aot_table(record)
    assert record["gpu"]["name"] in shown and "figures mean nothing" in shown and "the naive worker" in shown


@pytest.mark.slow
def test_cold_starts_are_measured_dry(setup):
    report = measure_starts(setup, ("no prefetch", "lazy", "read", "device"))
    assert not report.failed(), report.parts
    record = read_json(setup.out / "coldstart-dry.json")
    assert list(record["starts"]) == ["no prefetch", "lazy"] and record["floors"]["copy to it"] > 0
    assert all(one["rows"]["total"] > 0 and one["turns"] == 1 for one in record["starts"].values())
    assert "figures mean nothing" in starts_table(record)


SUMMARY = {"median": 2.0, "min": 1.0, "max": 3.0}
START = SUMMARY | {"taken": 1.0, "cold": True, "turns": 2, "rows": {"torch": 1.0, "total": 2.0}}
IMAGES = {"1": {"ours": SUMMARY, "theirs": SUMMARY, "ratio": 1.0}}
INVENTED = {"date": "2000-01-01", "dry": False, "gpu": {"name": "an invented GPU", "torch": "0.0"}, "side": 1024,
            "steps": 30}
WAY = {"dtype": "float16", "load": 1.0, "first": 1.0, "image": SUMMARY, "step": 0.05, "decode": 0.1, "encode": 0.01,
       "peak": 1e9, "held": 2e9, "dB": {"latents": 99.0, "picture": 99.0}}
RECORDS = {  # made up: no machine has measured them
    "headline-gpu": INVENTED | {
        "request": {"width": 1024, "height": 1024, "steps": 30}, "ways": {"eager": WAY, "CUDA graph": WAY | {"dB": {}}},
        "failed": {"fused QKV": "ChildProcessError: exit code 1 | Traceback | no such kernel"},
        "rates": {"float16": 6e14}, "operations": {"step": 1e13, "decode": 1e13, "image": 4e14},
        "jobs": {"png": 0.1, "jpeg": 0.1, "jobs": {}}},
    "aot-cuda": INVENTED | {
        "starts": {"aot": START, "diffusers": START, "naive": START, "import_torch": SUMMARY},
        "bake": {"seconds": 300.0, "bytes": 1e8, "psnr": 50.0}, "images": {"images": IMAGES},
        "compile": {"backend": "inductor", "first_call": 60.0, "images": IMAGES}},
    "coldstart-gpu": INVENTED | {
        "bytes": 6.94e9, "starts": {"diffusers": START, "naive": START}, "floors": {"import torch": 1.0}},
    "gpu-families": INVENTED | {"parts": {
        "half precision": {"result": {"tests": {"PASSED": 90, "FAILED": 1}, "failed": ["test_families.py::test_x"]}},
        "float32": {"error": "ChildProcessError: killed after 300 s", "tries": 1}}},
    "gpu-check": INVENTED | {"parts": {
        "worker": {"seconds": 31.2, "result": {"passed": True}},
        "aot": {"seconds": 1.0, "error": "OSError: no nvcc", "tries": 1}}},
    "bench-gpu": {"date": "2000-01-01", "machine": {"gpu": "an invented GPU", "torch": "0.0"}, "tiny": False, "rows": {
        "switch bfloat16": {"time": IMAGES, "turns": 3, "peak": 9e9, "psnr": 60.0, "least": 40},
        "switch attention: sliced": {"failed": "an error", "tries": 2}}}}
PLACES = [("8_lab/11_gpu_headline", "headline-gpu"), ("8_lab/06_bench_aot", "aot-cuda"),
          ("8_lab/04_coldstart", "coldstart-gpu"), ("0_core/03_families", "gpu-families"),
          ("8_lab/10_gpu_checks", "gpu-check"),
          ("8_lab/05_bench", "bench-gpu")]


@pytest.mark.parametrize(("notebook", "name"), PLACES)
@pytest.mark.parametrize("partly", [False, True], ids=["whole", "partly"])
def test_a_table_waits_for_its_record(notebook, name, partly, tmp_path, monkeypatch):
    """Without a record it says so; with one, also of a call that ended early, it names the machine."""
    cells = ["".join(cell["source"]) for cell in json.loads((ROOT / "nbs" / f"{notebook}.ipynb").read_text())["cells"]
             if cell["cell_type"] == "code"]
    source = next(text for text in cells if f"../results/{name}.json" in text)
    names = {"Path": Path, "json": json, "read_json": read_json, "Markdown": lambda text: shown.append(text),
             "headline_table": headline_table, "plot_headline": gpu_headline.plot_headline,
             "checks_table": checks_table, "table": table, "unused": unused,
             "as_markdown": lambda lines: "\n".join(map(str, lines))}
    shown: list[str] = []
    for folder in ("nbs/8_lab", "results"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "nbs/8_lab")
    exec(source, dict(names))
    assert "not measured" in shown.pop().lower() and not shown
    missing = dict.fromkeys(("rates", "operations", "jobs", "bake", "images", "compile")) if partly else {}
    record = RECORDS[name] | {key: value for key, value in missing.items() if key in RECORDS[name]}
    if partly:
        record |= {key: {} for key in ("ways", "starts", "floors", "failed", "parts", "rows") if key in record}
    Path("../../results", f"{name}.json").write_text(json.dumps(record))
    exec(source, dict(names))
    assert "an invented GPU" in shown[0] and "not measured" not in shown[0].lower()
