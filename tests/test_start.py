"""Starts that cannot succeed, or not yet: one clear sentence, at the queue and in the log, and never a hang."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from sdworker.core.checkpoint_files import weight_files
from sdworker.core.model_info import EMBEDDED
from sdworker.lab.queue_server import WorkerRun, run_workers

OURS = [sys.executable, "-m", "sdworker.cli.main", "start"]
JOBS = [{"id": name, "input": {"prompt": "a red star", "num_inference_steps": 2}} for name in ("first", "second")]


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(EMBEDDED, tmp_path / "the model"))


def started(model: object, command: list[str] = OURS, **options) -> WorkerRun:
    return run_workers(command, JOBS, {"SDWORKER_MODEL": str(model), "HF_HUB_OFFLINE": "1"}, **options)


def assert_one_sentence(worker_run: WorkerRun, *words: str) -> None:
    assert "first" in worker_run.answers, worker_run.log
    error = worker_run.answers["first"]["error"]
    assert str(Path(tempfile.gettempdir())) not in error, "the folders of a path are for the log"
    assert all(word in error for word in words) and "\n" not in error, error
    assert "Traceback" not in worker_run.log


def assert_one_job_gets_the_reason(worker_run: WorkerRun, *words: str) -> None:
    assert_one_sentence(worker_run, *words)
    assert worker_run.answers["first"]["output"]["code"] == "model_error", "in the worker's own words"
    assert worker_run.answers["first"]["stopPod"] and worker_run.code == 1
    assert set(worker_run.taken_at) == {"first"}, "the others stay in the queue"


@pytest.mark.parametrize("load", ["background", "lazy", "eager"])
def test_a_truncated_file_is_one_jobs_answer_and_the_workers_end(model, load):
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    worker_run = run_workers(OURS, JOBS, {"SDWORKER_MODEL": str(model), "SDWORKER_LOAD": load,
                                          "SDWORKER_CONCURRENCY": "2"}, stop=False)
    assert_one_job_gets_the_reason(worker_run, f"the model/vae/{weights.name} has", "bytes", "fetch the model again")
    assert f"{weights} has" in worker_run.log, "the log has the whole path"


CUT = """
import sdworker.serve.handler, pathlib, sys
look = sdworker.serve.handler._prefetch_and_count
def cut_after(queue):
    result, weights = look(queue), pathlib.Path(sys.argv[1])
    weights.write_bytes(weights.read_bytes()[:-1000])
    return result
sdworker.serve.handler._prefetch_and_count = cut_after
from sdworker.cli.main import app
app(["start"])
"""


COUNT = """
import collections, sys
reads = collections.Counter()
def count(event, args):
    if event == "open" and str(args[0]).endswith(".safetensors"):
        reads[args[0]] += 1
sys.addaudithook(count)
import sdworker.serve.answer
answer = sdworker.serve.answer.respond
async def respond(*arguments):
    print("headers read:", sorted(reads.values()), flush=True)
    return await answer(*arguments)
sdworker.serve.answer.respond = respond
from sdworker.cli.main import app
app(["start"])
"""


def test_a_start_reads_the_header_of_each_weight_file_once(model):
    for path in model.rglob("*.safetensors"):
        os.utime(path, (0, 0))  # not just written, as a model is
    files = len(weight_files(model))
    worker_run = started(model, [sys.executable, "-c", COUNT])
    assert "error" not in worker_run.answers["second"], worker_run.answers
    counts = [line.partition("headers read: ")[2] for line in worker_run.log.splitlines() if "headers read: " in line]
    assert counts[-1] == str([1] * files), "checked, counted and loaded, for all jobs"


def test_a_file_that_is_cut_after_the_first_look_is_named_and_ends_the_worker(model):
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    worker_run = started(model, [sys.executable, "-c", CUT, str(weights)], stop=False)
    assert_one_sentence(worker_run, f"the model/unet/{weights.name} has", "bytes", "fetch the model again")
    assert worker_run.code == 1 and "second" not in worker_run.answers, (
        "no second job is taken that could not be drawn either")


def test_a_missing_tokenizer_is_named_and_the_worker_waits_for_it(model):
    for path in (model / "tokenizer").iterdir():
        path.unlink()
    worker_run = started(model)
    assert_one_sentence(worker_run, "the model/tokenizer/tokenizer.json is missing", "fetch the model again")
    assert worker_run.answers["second"] == worker_run.answers["first"] and worker_run.code is None


VANISHING = """
import sdworker.serve.handler, sdworker.start.load, pathlib, sys
folder = pathlib.Path(sys.argv[1])
away = folder.with_name("away")
place = sdworker.start.load.place
def unmounted(*args):  # after the files were checked, before they are read
    if away.exists():
        raise SystemError("placed again while the folder is away")
    folder.rename(away)
    return place(*args)
sdworker.start.load.place = unmounted
respond = sdworker.serve.answer.respond
async def and_back(*arguments):
    try:
        return await respond(*arguments)
    except Exception:
        away.rename(folder)
        sdworker.start.load.place = place
        raise
sdworker.serve.answer.respond = and_back
sdworker.serve.handler.start()
"""


def test_a_folder_that_goes_away_in_the_middle_of_a_start_and_comes_back(model):
    worker_run = started(model, [sys.executable, "-c", VANISHING, str(model)])
    assert "is missing" in worker_run.log, "the load in the background has met it"
    assert_one_sentence(worker_run, "the model", "no such folder")  # the job that waited has tried again
    assert "output" in worker_run.answers["second"], "the next job tries again, and finds it"


LATE = """
import shutil, sys
import sdworker.serve.handler
come = sys.argv[1:]
respond = sdworker.serve.answer.respond
async def mounted_after(*arguments):
    try:
        return await respond(*arguments)
    except Exception:
        shutil.copytree(*come)
        raise
sdworker.serve.answer.respond = mounted_after
sdworker.serve.handler.start()
"""


@pytest.mark.parametrize("file", ["tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json",
                                  "text_encoder/config.json"])
def test_a_small_file_that_is_missing_is_named_too(model, file):
    (model / file).unlink()
    assert_one_sentence(started(model), f"the model/{file} is missing", "fetch the model again")


def test_a_folder_that_comes_late(tmp_path):
    folder = tmp_path / "volume" / "model"
    worker_run = started(folder, [sys.executable, "-c", LATE, str(EMBEDDED), str(folder)])
    assert_one_sentence(worker_run, folder.name, "no such folder")
    assert "output" in worker_run.answers["second"]


@pytest.mark.parametrize(("typo", "message"), [
    ("embeded", "give `embedded`, a folder, or a model id like owner/name"),
    ("./models/sdxl", "there is no such folder"),
])
def test_a_model_that_cannot_exist_is_one_jobs_answer_and_the_workers_end(typo, message):
    worker_run = started(typo, stop=False)
    assert_one_job_gets_the_reason(worker_run, message)
    line, *_ = [line for line in worker_run.log.splitlines() if "the next job gets this error" in line]
    assert repr(typo) in line and message in line


def test_a_model_id_that_cannot_be_had_is_answered_with_the_reason():
    worker_run = started("stabilityai/stable-difusion-xl")
    assert_one_sentence(worker_run, "SDWORKER_MODEL is 'stabilityai/stable-difusion-xl'", "not baked into", "bake it")
    assert worker_run.code is None, "a volume may come yet"


def test_a_hub_that_does_not_answer(tmp_path):
    nowhere = {"SDWORKER_MODEL": "owner/name", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    worker_run = run_workers(OURS, JOBS, nowhere)
    assert_one_sentence(worker_run, "owner/name cannot be fetched from the hub", "check the network")
    assert worker_run.code is None, "a network may come back"
