"""Faults planted one at a time, each found by `sdworker doctor`; and the rows of trouble that the guide has."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sdworker.build.bake import bake
from sdworker.build.manifest import set_writable
from sdworker.core.families import FAMILIES
from sdworker.core.model_info import EMBEDDED, read_model_info
from sdworker.embedded.tiny_models import MINIATURES, miniature, with_refiner
from sdworker.engine.memory_planner import SPARE, Way, meta_components, needed
from sdworker.lab.hub_server import Hub
from sdworker.lab.queue_server import run_workers

OURS = [sys.executable, "-m", "sdworker.cli.main", "start"]
JOB = {"id": "job", "input": {"prompt": "a red star", "num_inference_steps": 2}}
HERE = {"RUNPOD_WEBHOOK_GET_JOB": "", "RUNPOD_API_KEY": "", "BUCKET_ENDPOINT_URL": ""}
DISK = "import collections, shutil; shutil.disk_usage = lambda path: collections.namedtuple('U', 'free')({free})\n"
GPU = """
import sys, torch, types
torch.version.cuda = "12.8"
sys.modules["pynvml"] = types.SimpleNamespace(
    nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda k: k, nvmlDeviceGetName=lambda handle: "a GPU",
    nvmlSystemGetDriverVersion=lambda: "535.1", nvmlSystemGetCudaDriverVersion=lambda: {cuda},
    nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(free={free}, total=24e9),
    nvmlDeviceGetCudaComputeCapability=lambda handle: {capability})
"""


def call(plant: str, folder: Path, **variables: str) -> tuple[int, dict[str, dict]]:
    """The exit code, and the findings by name."""
    code = f"{plant}\nfrom sdworker.cli.main import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code, "doctor", "--json"], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, **HERE, **variables})
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {one["name"]: one for one in json.loads(done.stdout)["findings"]}


def test_a_healthy_machine_without_a_gpu_has_warnings_and_no_failures(tmp_path):
    code, findings = call("", tmp_path)
    states = [one["state"] for one in findings.values()]
    assert code == 0 and "fail" not in states and "warn" in states and len(findings) == 19
    assert all(one["remedy"] for one in findings.values() if one["state"] != "pass")


CLOSED = {"BUCKET_ENDPOINT_URL": "http://127.0.0.1:9/", "BUCKET_ACCESS_KEY_ID": "x", "BUCKET_SECRET_ACCESS_KEY": "y"}
FAULTS = {
    "a name misspelt": ("settings", "warn", "did you mean SDWORKER_MODEL?", "", {"SDWORKER_MODLE": "embedded"}),
    "a value that makes no sense": ("settings", "fail", "SDWORKER_MAX_STEPS is 'many'", "",
                                    {"SDWORKER_MAX_STEPS": "many"}),
    "an SDK's variable that makes no sense": ("settings", "fail", "RUNPOD_PING_INTERVAL is 'abc'", "",
                                              {"RUNPOD_PING_INTERVAL": "abc"}),
    "an SDK's variable that this worker overrides": ("log", "warn", "RUNPOD_DEBUG_LEVEL has no effect", "",
                                                     {"RUNPOD_DEBUG_LEVEL": "WARN"}),
    "a full disk": ("disk", "warn", "0.1 GB free", DISK.format(free=1e8), {}),
    "a cache that cannot be written": ("caches", "warn", "cannot be written", "", {"TORCH_HOME": "/proc/nowhere"}),
    "no model, and none may be fetched": ("weights", "fail", "was not found", "",
                                          {"SDWORKER_MODEL": "owner/name", "SDWORKER_OFFLINE": "1"}),
    "plain requests over the limit": ("sizes", "fail", "plain requests would be refused", "",
                                      {"SDWORKER_MAX_STEPS": "5"}),
    "no GPU where one is wanted": ("device", "fail", "there is no GPU", "", {"SDWORKER_DEVICE": "cuda"}),
    "an old driver": ("driver", "fail", "has CUDA 11.4",
                      GPU.format(cuda=11040, free=24e9, capability=(8, 9)), {}),
    "an old GPU": ("capability", "fail", "compute capability 6.1",
                   GPU.format(cuda=12080, free=24e9, capability=(6, 1)), {"SDWORKER_PROFILE": "guide"}),
    "a GPU that is full": ("memory", "fail", "0.01 GB are free",
                           GPU.format(cuda=12080, free=6e6, capability=(8, 9)), {}),
    "xformers without a GPU": ("attention", "warn", "not used: no CUDA device", "", {"SDWORKER_PROFILE": "guide"}),
    "no bytecode": ("bytecode", "warn", "modules without bytecode", "", {"PYTHONDONTWRITEBYTECODE": "1",
                                                                 "PYTHONPYCACHEPREFIX": "/nowhere"}),
    "a load that begins with the first job": ("start", "warn", "waits for the whole load", "",
                                              {"SDWORKER_LOAD": "lazy"}),
    "an AOT package that is not there": ("aot", "fail", "there is none", "", {"SDWORKER_ENGINE": "aot"}),
    "a port that is none": ("port", "fail", "PORT is 'http'", "", {"PORT": "http"}),
    "a health route that nobody asks": ("port", "warn", "PORT_HEALTH is not set", "",
                                        {"PORT": "5000", "RUNPOD_ENDPOINT_ID": "e1"}),
    "half a queue": ("queue", "fail", "RUNPOD_WEBHOOK_POST_OUTPUT is not set", "",
                     {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/take"}),
    "half a bucket": ("bucket", "fail", "BUCKET_ACCESS_KEY_ID is not set", "",
                      {"BUCKET_ENDPOINT_URL": "http://127.0.0.1:9/"}),
    "a bucket that is not reached": ("bucket", "fail", "cannot be reached", "", CLOSED),
    "answers that are too large": ("payload", "warn", "not even one of them", "", {"SDWORKER_MAX_SIZE_PX": "8192"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_reported(fault, tmp_path):
    name, state, message, plant, variables = FAULTS[fault]
    code, findings = call(plant, tmp_path, **variables)
    assert findings[name]["state"] == state and message in findings[name]["detail"], findings[name]
    assert findings[name]["remedy"] and code == (1 if state == "fail" else 0)


FINDINGS = """
import contextlib, json, sys, torch
from sdworker.operate import doctor
from sdworker.engine.memory_planner import NotComputed, meta_components
from sdworker.core.settings import get_settings
with contextlib.suppress(NotComputed):
    meta_components(doctor.model_info(), "float32")  # diffusers queries a real GPU when it is imported
torch.cuda.is_available = lambda: {cuda}
selected = []
import sdworker.aot.engine
sdworker.aot.engine.find_aot_package = lambda model, *key: selected.append(key[:2]) or (None, "")
import sdworker.aot.selection
sdworker.aot.selection.packages_in = lambda places: True
from sdworker.serve.start_checks import run_check
looks = {{name: vars(run_check(getattr(doctor, name), get_settings())) for name in ("memory", "attention")}}
run_check(doctor.aot, get_settings().model_copy(update={{"attention": "sdpa"}}))  # with another none is looked for
print(json.dumps([looks, selected]))
"""


def look(folder: Path, cuda: bool, **variables: str) -> tuple[dict[str, dict], list[list[str]]]:
    """Findings that depend on the family, with a GPU of 24 GB, and where an AOT package was looked for."""
    code = GPU.format(cuda=12080, free=20e9, capability=(8, 9)) + FINDINGS.format(cuda=cuda)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, **HERE, "SDWORKER_MODEL": str(folder), **variables})
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("pipeline", [
    "StableDiffusionXLPipeline", *(pytest.param(name, marks=pytest.mark.slow) for name in MINIATURES)])
def test_every_family_is_looked_at(pipeline, tmp_path):
    folder = miniature(pipeline, tmp_path / "tiny") if pipeline in MINIATURES else EMBEDDED
    findings, selected = look(folder, cuda=True, SDWORKER_ATTENTION="sliced", SDWORKER_MAX_BATCH="2")
    family = FAMILIES.get(pipeline)
    batch = min(2, family.batch) if family else 0
    expected = f"{batch} image(s) at once take 2.5" if family else f"not computed for this family: {pipeline} is not in"
    assert findings["memory"]["state"] == "pass" and findings["memory"]["detail"].startswith(expected)
    assert selected == ([["cuda", family.gpu_dtype]] if family and family.compiles else [])
    sliceable = "works" if pipeline.startswith(("Stable", "Latent")) and "3" not in pipeline else "cannot be sliced"
    assert sliceable in findings["attention"]["detail"]
    assert "anew" not in json.dumps(findings)


@pytest.mark.slow
def test_a_refiner_has_to_fit_too(tmp_path):
    models = EMBEDDED, with_refiner(tmp_path / "model")
    base, both = (needed(meta_components(read_model_info(model), "float16"), Way(), 64, 64) for model in models)
    plant = GPU.format(cuda=12080, free=SPARE + (base + both) / 2, capability=(8, 9))
    alone, refined = (call(plant, tmp_path, SDWORKER_MODEL=str(model), SDWORKER_MAX_BATCH="1")[1]["memory"]
                      for model in models)
    assert (alone["state"], refined["state"]) == ("pass", "warn") and "SDWORKER_OFFLOAD=" in refined["remedy"]


@pytest.mark.slow
def test_a_missing_class_is_not_a_broken_library(tmp_path):
    folder = miniature("FluxPipeline", tmp_path / "tiny")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FluxTransformer2DModel", "NoSuchModel"))
    findings, _ = look(folder, cuda=False, SDWORKER_ATTENTION="sliced")
    assert "not computed for this family: " in findings["memory"]["detail"]
    assert {findings[name]["state"] for name in ("memory", "attention")} == {"pass"}
    assert all("needs NoSuchModel, which neither" in findings[name]["detail"] for name in ("memory", "attention"))


def test_a_changed_byte_is_reported(tmp_path):
    model = tmp_path / "model"
    bake(str(EMBEDDED), model, None, "")
    set_writable(model, True)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, findings = call("", tmp_path, SDWORKER_MODEL=str(model))
    assert code == 1 and str(weights) in findings["weights"]["detail"], findings["weights"]


def test_a_wrong_clock_is_reported(tmp_path):
    class Bucket(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(403)
            self.send_header("Date", "Sun, 01 Nov 2020 10:00:00 GMT")
            self.end_headers()

        do_PUT = do_HEAD

        def log_message(self, *about: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, findings = call("", tmp_path, **CLOSED | {
            "BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}/"})
        server.shutdown()
    assert code == 1 and "refuses the upload" in findings["bucket"]["detail"]
    assert "minutes fast" in findings["clock"]["detail"]


def test_an_always_on_worker_is_reported(tmp_path):
    (tmp_path / "hub.json").write_text('{"minWorkers": 2}')
    assert "keeps 2 worker(s) always on" in call("", tmp_path)[1]["costs"]["detail"]


@pytest.mark.parametrize(("variables", "message"), [({"SDWORKER_MAX_STEPS": "5"}, "plain requests would be refused"),
                                                 ({"RUNPOD_WEBHOOK_POST_OUTPUT": ""}, "results would be lost")])
def test_a_start_that_could_not_answer_ends_before_it_takes_a_job(variables, message):
    worker_run = run_workers(OURS, [JOB], variables, stop=False)
    assert worker_run.code == 1 and worker_run.taken_at == {} and message in worker_run.log, worker_run.log


def test_the_quick_looks_only_warn_of_what_a_worker_can_live_with(tmp_path):
    worker_run = run_workers(OURS, [JOB], {"SDWORKER_MAX_SIZE_PX": "8192"})
    assert "output" in worker_run.answers["job"] and "payload: 8 images of 8192 pixels" in worker_run.log


FULL_DISK = DISK.format(free=2e6) + "from sdworker.cli.main import app\napp(['start'])"


def test_out_of_disk_space_is_a_sentence_and_a_baked_model_needs_none(tmp_path):
    """The guide's first row: a download onto a full disk, and then its cure."""
    with Hub({"owner/name": EMBEDDED}, "token") as hub:
        fetching = {"SDWORKER_MODEL": "owner/name", "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token,
                    "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        failed = run_workers([sys.executable, "-c", FULL_DISK], [JOB], fetching)
        assert "are missing; free that much or choose a folder on another disk" in failed.answers["job"]["error"]
        assert not list((tmp_path / "cache").rglob("*.safetensors")), "nothing is left half written"
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    bake(str(EMBEDDED), tmp_path / "model", None, "")
    baked = run_workers([sys.executable, "-c", FULL_DISK], [JOB], {"SDWORKER_MODEL": str(tmp_path / "model")})
    assert "output" in baked.answers["job"], baked.log


def test_xformers_that_does_not_work_costs_a_warning_and_no_picture():
    """The guide's last row: where it cannot be used, pictures are drawn all the same, and the answer says why."""
    worker_run = run_workers(OURS, [JOB], {"SDWORKER_PROFILE": "guide", "SDWORKER_DEVICE": "cpu"})
    answer = worker_run.answers["job"]["output"]
    assert len(answer["images"]) == 1 and any("xformers" in warning for warning in answer["warnings"])
    assert "xformers not used: no CUDA device" in worker_run.log and "xformers enabled" not in worker_run.log
    assert "Loading model..." in worker_run.log and "sliced enabled" in worker_run.log
