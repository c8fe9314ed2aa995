"""What a GPU's failures, missing memory and wrong settings do to real workers; errors are raised where no GPU can."""

import json
import os
import re
import subprocess
import sys
import time
from functools import partial

import handled
import httpx
import pytest
from handled import HANDLER

from sdworker.core.settings import get_settings
from sdworker.lab.demo import free_port
from sdworker.lab.queue_server import run_workers
from sdworker.serve.handler import handler

LOST = "the GPU takes no more work from this process"
ENGINE = "sdworker.engine.pipeline.FamilyEngine"

# What follows is put before a worker's start, and breaks its engine, or the reading of weights, whose errors diffusers
# wraps in one of its own.
LIBRARY = """
import safetensors.torch, torch, sdworker.serve.handler, sdworker.engine.pipeline
from unittest.mock import patch

TEXT = '''CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more
information. CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might
be incorrect. For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
'''

def illegal():
    error = torch.AcceleratorError(TEXT)
    error.error_code = 700  # as PyTorch sets it
    return error

def unreadable():
    "An error that does not show that the context is lost."
    patch("torch.cuda.is_initialized", return_value=True).start()
    patch("torch.cuda.synchronize", side_effect=illegal()).start()
    return RuntimeError("run_func_(...) API call failed at model_container_runner.cpp, line 145")

def fail(owner, name, error, first=0, last=10**9):
    "Make calls of a method fail, from call number `first` to `last`."
    original, calls = getattr(owner, name), []
    def broken(*args, **kwargs):
        calls.append(None)
        if first <= len(calls) - 1 <= last:
            raise error()
        return original(*args, **kwargs)
    setattr(owner, name, broken)
"""


def worker(*lines: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", "\n".join([LIBRARY, *lines, "sdworker.serve.handler.start()"])]


job = partial(handled.job, num_inference_steps=2)


@pytest.mark.parametrize(("stage", "error"), [
    ("encode", "illegal"), ("decode", "unreadable"),
    ("denoise", "lambda: RuntimeError('Triton Error [CUDA]: an illegal memory access was encountered')")])
def test_a_lost_gpu_ends_the_worker_and_no_further_job_is_taken(stage, error):
    worker_run = run_workers(worker(f"fail(sdworker.engine.pipeline.FamilyEngine, {stage!r}, {error}, first=1)"),
                             [job("drawn"), job("lost"), job("third"), job("fourth")], {"SDWORKER_LOAD": "lazy"}, 60,
                             stop=False)
    assert "images" in worker_run.answers["drawn"].get("output", {}), worker_run.log
    assert worker_run.answers["lost"]["error"].startswith(f"{LOST} (CUDA error: an illegal memory access was "
                                                          "encountered)")
    assert worker_run.answers["lost"]["stopPod"], "the answer asks the platform to end this worker"
    assert set(worker_run.taken_at) == {"drawn", "lost"}, "the others are left for another worker"
    assert worker_run.code, "the process ends by itself, and not as if all were well"


def test_a_lost_gpu_is_the_answer_of_all_jobs_in_flight():
    environment = {"SDWORKER_LOAD": "eager", "SDWORKER_CONCURRENCY": "4"}
    jobs = [job("drawn"), *(job(f"lost-{k}", width=32 * k) for k in (1, 2, 3, 4)), job("left")]
    worker_run = run_workers(worker(f"fail({ENGINE}, 'decode', illegal, first=2)"), jobs, environment, stop=False,
                             arrivals=[0, 2, 2, 2, 2, 4])
    assert "images" in worker_run.answers["drawn"]["output"], worker_run.log
    for k in (1, 2, 3, 4):
        assert worker_run.answers[f"lost-{k}"]["error"].startswith(LOST) and worker_run.answers[f"lost-{k}"]["stopPod"]
    assert "left" not in worker_run.taken_at and worker_run.code == 1
    assert set(worker_run.answer_count.values()) == {1}


HANGING = """
import atexit, threading
never = threading.Event()
atexit.register(never.wait)  # as a driver that waits for its kernels
denoise, calls = sdworker.engine.pipeline.FamilyEngine.denoise, []
def denoise_or_hang(self, encoded, specs, params, on_step):
    calls.append(specs)
    if len(calls) <= 2:  # the warm-up, and the first job
        return denoise(self, encoded, specs, params, on_step)
    on_step(1, params.steps, None)
    never.wait()
sdworker.engine.pipeline.FamilyEngine.denoise = denoise_or_hang
"""


def test_a_step_that_hangs_is_the_answer_of_all_jobs_in_flight_and_the_workers_end():
    environment = {"SDWORKER_LOAD": "eager", "SDWORKER_CONCURRENCY": "2", "SDWORKER_STEP_TIMEOUT": "8"}
    worker_run = run_workers(worker(HANGING), [job("drawn"), job("hung"), job("waiting", width=32), job("left")],
                             environment, 60, stop=False, arrivals=[0, 2, 2, 2])
    assert "images" in worker_run.answers["drawn"]["output"], worker_run.log
    for name in ("hung", "waiting"):
        assert worker_run.answers[name]["error"].startswith("a step took more than 8 s, so this worker ends")
        assert worker_run.answers[name]["stopPod"] and worker_run.answer_count[name] == 1
    assert "left" not in worker_run.taken_at and worker_run.code == 1, "it does not wait for the driver"


FULL_DISK = """
import os, sys
def refuse(event, arguments):
    writes = event in ("os.mkdir", "tempfile.mkstemp", "tempfile.mkdtemp") or (
        event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if writes and not str(arguments[0]).startswith("/dev/"):
        raise OSError(28, "No space left on device", str(arguments[0]))
sys.addaudithook(refuse)
"""


def test_a_full_disk_costs_no_answer():
    """A job needs no file: pictures are encoded in memory, and the answer takes them, or a bucket."""
    worker_run = run_workers(worker(FULL_DISK), [job("drawn", num_images=2), job("bad", width=100),
                                                 job("next")])
    assert all("images" in worker_run.answers[name]["output"] for name in ("drawn", "next")), worker_run.log
    assert worker_run.answers["bad"]["output"]["code"] == "invalid_request"


CLOCK = """
import time, sdworker.engine.pipeline
real, jump = time.time, [0.0]
def jumping():
    return real() + jump[0]
time.time = jumping
denoise = sdworker.engine.pipeline.FamilyEngine.denoise
def jump_and_denoise(self, *arguments):
    jump[0] = 86_400.0 if jump[0] <= 0 else -86_400.0
    return denoise(self, *arguments)
sdworker.engine.pipeline.FamilyEngine.denoise = jump_and_denoise
"""


def test_a_clock_that_is_set_anew_neither_expires_a_job_nor_shows_in_its_timings():
    jobs = [job("plain"), job("next")]
    timely = job("timely", deadline=time.time() + 90_000)  # an hour more than the clock jumps
    worker_run = run_workers(worker(CLOCK), [*jobs, timely], {"SDWORKER_LOAD": "eager"})
    for name in ("plain", "next", "timely"):
        timings = worker_run.answers[name]["output"]["timings"]
        assert all(0 <= seconds < 60 for seconds in timings.values() if isinstance(seconds, float)), timings


@pytest.mark.parametrize("owner", ["safetensors.torch, 'load_file'", "sdworker.engine.pipeline.FamilyEngine, 'decode'"])
def test_a_gpu_that_is_lost_before_the_first_job(owner):
    """In the load, or in the warm-up that follows it in the background."""
    worker_run = run_workers(worker(f"fail({owner}, illegal)"), [job("first"), job("second")], stop=False,
                             arrivals=[5, 5])
    assert worker_run.answers["first"]["error"].startswith(LOST), worker_run.log
    assert "damaged" not in worker_run.log
    assert set(worker_run.taken_at) == {"first"} and worker_run.code


def test_out_of_memory_in_a_job_is_no_lost_gpu():
    """Alone it does not fit, and is refused; the worker stays, and the next job is drawn."""
    worker_run = run_workers(worker("out = lambda: torch.AcceleratorError(TEXT.replace('an illegal memory access was "
                                    "encountered', 'out of memory'))",
                                    "fail(sdworker.engine.pipeline.FamilyEngine, 'decode', out, last=0)"),
                             [job("large"), job("small")], {"SDWORKER_LOAD": "lazy"})
    assert worker_run.answers["large"]["error"].startswith("not even one image of this size fits"), worker_run.log
    assert "output" in worker_run.answers["small"] and "stopPod" not in worker_run.answers["large"]


def test_a_batch_that_did_not_fit_is_not_tried_again():
    words = "GET was unable to find an engine to execute this computation"
    code = f"few = lambda: RuntimeError({words!r})\n" \
        "fail(sdworker.engine.pipeline.FamilyEngine, 'decode', few, last=0)\n" \
        "original = sdworker.engine.pipeline.FamilyEngine.decode\n" \
        "def counted(self, latents):\n    print('images at once:', len(latents), flush=True)\n" \
        "    return original(self, latents)\nsdworker.engine.pipeline.FamilyEngine.decode = counted"
    worker_run = run_workers(worker(code),
                             [job("first", num_images=4), job("second", num_images=4), job("small", num_images=2),
                              job("smaller", num_images=4, width=32, height=32)],
                             {"SDWORKER_LOAD": "lazy"})
    sizes = [int(images) for images in re.findall(r"images at once: (\d+)", worker_run.log)]
    assert sizes == [4, 2, 2, 2, 2, 2, 4], "the second job uses the batch size that the first has learned"
    warnings = {name: [text for text in worker_run.answers[name]["output"]["warnings"] if "do not fit" in text]
                for name in worker_run.answers}
    assert warnings["second"] == ["4 images in one call do not fit into memory, so they are drawn 2 at a time."]
    assert warnings["first"] == [warnings["second"][0][:-1] + "; set SDWORKER_MAX_BATCH to 2 to save the attempt."]
    assert warnings["small"] == warnings["smaller"] == []


def test_a_load_that_finds_no_memory_is_tried_again_and_blames_no_file():
    worker_run = run_workers(worker("import os", "os.environ['SDWORKER_LOAD'] = 'lazy'",
                                    "out = lambda: RuntimeError(\"DefaultCPUAllocator: can't allocate memory: you "
                                    "tried to allocate 8 bytes\")",
                                    "fail(safetensors.torch, 'load_file', out, last=0)"), [job("first"), job("second")])
    error = worker_run.answers["first"]["error"]
    assert error.startswith("the weights of embedded take") and "no memory left" in error and "damaged" not in error
    assert "stopPod" not in worker_run.answers["first"] and "output" in worker_run.answers["second"]


def test_the_local_api_ends_as_well():
    port = free_port()
    code = "\n".join([LIBRARY, "fail(sdworker.engine.pipeline.FamilyEngine, 'denoise', illegal)",
                      f"sdworker.serve.handler.serve(port={port})"])
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"SDWORKER_LOAD": "lazy", "SDWORKER_MODLE": "embedded"})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client:
            for _ in range(600):
                try:
                    answer = client.post("/runsync", json=job("one")).json()
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
        log, _ = process.communicate()
    finally:
        process.kill()
    assert answer["error"].startswith(LOST), log
    assert process.returncode == 1 and "the worker ends" in log
    assert "SDWORKER_MODLE is not a setting, and changes nothing; did you mean SDWORKER_MODEL?" in log


@pytest.fixture
def wrong_variable(monkeypatch):
    monkeypatch.setenv("SDWORKER_DEVICE", "tpu")
    get_settings.cache_clear()
    yield "SDWORKER_DEVICE is 'tpu': should be 'auto', 'cpu' or 'cuda'."
    get_settings.cache_clear()


def test_settings_that_make_no_sense_at_each_door(wrong_variable):
    """A start ends with the sentence and takes no job; a handler that is called without one answers with it."""
    worker_run = run_workers(HANDLER, [job("one")], stop=False)
    assert worker_run.code == 1 and worker_run.log.strip() == f"sdworker: {wrong_variable}" and not worker_run.taken_at
    served = subprocess.run([sys.executable, "-m", "sdworker.cli.main", "serve"], capture_output=True, text=True)
    assert served.returncode == 1 and served.stderr.strip() == f"sdworker: {wrong_variable}"
    assert handler(job("one")) == {
        "error": wrong_variable, "code": "settings_error", "field": None, "refresh_worker": True}


def test_a_cluster_s_variables_and_a_missing_home_do_not_end_a_start():
    """Kubernetes names a service's port in SDWORKER_PORT; a container may run under a number that has no user."""
    begin = worker("import os, pwd", "for name in ('HOME', 'XDG_CACHE_HOME'): os.environ.pop(name, None)",
                   "pwd.getpwuid = lambda uid: {}[uid]")
    worker_run = run_workers(begin, [job("one", num_inference_steps=2)], {"SDWORKER_PORT": "tcp://10.0.0.7:8000"})
    assert worker_run.answers["one"].get("output", {}).get("images"), worker_run.log
    assert "SDWORKER_PORT is not a setting, and changes nothing; remove it." in worker_run.log


@pytest.mark.parametrize("odd", [None, [], "text", 5, {}, {"id": 5}, {"id": {"a": [1]}, "input": "x"}, {"id": None,
                         "input": {"prompt": ["x", 5]}}, {"input": {"prompt": "x", "width": float("nan")}}])
def test_no_job_makes_the_handler_raise(odd):
    assert set(handler(odd)) == {"error", "code", "field"}
    json.dumps(handler(odd))


@pytest.mark.parametrize("broken", ["sdworker.serve.answer.note", "sdworker.serve.monitor.gpu_state",
                                    "sdworker.serve.monitor._sum_up"])
def test_neither_log_nor_monitor_keeps_an_answer_back(monkeypatch, broken):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")
    monkeypatch.setattr(broken, fail)
    assert handler({"id": "one", "input": {}})["error"].startswith("prompt is missing")


@pytest.mark.parametrize(("name", "value"), [("RUNPOD_LOG_LEVEL", "verbose"), ("RUNPOD_PING_INTERVAL", "abc"),
                                               ("RUNPOD_MIN_CUDA_VERSION", "abc")])
def test_nonsense_in_the_sdks_variables_ends_the_start_with_a_sentence(name, value):
    done = subprocess.run([sys.executable, "-m", "sdworker.cli.main", "serve"], text=True, capture_output=True,
                          env=os.environ | {name: value})
    assert done.returncode == 1 and f"{name} is '{value}': should be" in done.stderr and "Traceback" not in done.stderr
