"""`.runpod/handler.py`, the production loop of the unmodified SDK, at a queue on 127.0.0.1."""

import sys
from pathlib import Path

import pytest

from sdworker.embedded.shapes import judge
from sdworker.lab.queue_server import run_workers
from sdworker.serve.image_io import from_data_uri

PROMPT = "a large red star on a blue background"
HANDLER = [sys.executable, str(Path(__file__).parent.parent / ".runpod" / "handler.py")]  # what RunPod starts


def job(name: str, **fields) -> dict:
    return {"id": name, "input": {"prompt": PROMPT, "seed": 7} | fields}


def test_production_loop_answers_good_and_bad_jobs():
    worker_run = run_workers(HANDLER,
                             [job("bad", width=100), job("good"), job("worse", prompt=[PROMPT, 5]), job("again")])
    answers, log = worker_run.answers, worker_run.log
    assert answers["bad"]["error"].startswith("width is 100")
    assert answers["worse"]["error"].startswith("prompt should be text")
    image = answers["good"]["output"]["images"][0]
    assert all(judge(from_data_uri(image), PROMPT).values())
    assert answers["again"]["output"]["images"][0] == image, "one process, one seed, one picture"
    assert log.count("Loading model...") == 1 and "refresh_worker" not in log
    assert PROMPT not in log and "base64" not in log, "neither prompts nor pictures in the log"


def test_a_queue_that_goes_away_is_waited_for_in_one_line_of_the_log():
    worker_run = run_workers(HANDLER, [job("late")], arrivals=[4.0], away=(0.2, 3.5))
    assert "output" in worker_run.answers["late"]
    assert worker_run.log.count("no job can be fetched") == 1, worker_run.log[-3000:]
    assert worker_run.log.count("Ping Request Error") <= 1 and "urllib3" not in worker_run.log
    assert "Failed to get job" not in worker_run.log and "monitor_stop_signals" not in worker_run.log


def test_previews_come_while_a_picture_is_drawn():
    worker_run = run_workers(HANDLER, [job("seen", previews=True, n=4, num_inference_steps=100), job("plain")])
    messages = worker_run.progress["seen"]
    steps = [message["step"] for message in messages]
    assert steps == sorted(set(steps)) and steps[-1] < messages[-1]["steps"] == 400
    for message in messages:
        assert message["seconds_left"] >= 1 and len(message["preview"]) < 64_000
        assert from_data_uri(message["preview"]).size == (32, 32)
    assert worker_run.answers["seen"]["output"]["warnings"] == [] and "plain" not in worker_run.progress


@pytest.mark.parametrize("way", ["background", "lazy", "eager"])
def test_the_ledger_comes_once_and_adds_up(way):
    worker_run = run_workers(HANDLER, [job("first"), job("second")], {"SDWORKER_LOAD": way})
    first, second = (worker_run.answers[name]["output"]["timings"] for name in ("first", "second"))
    rows = first["cold_start"]
    assert "cold_start" not in second
    assert set("interpreter worker runpod torch transformers diffusers weights".split()) < set(rows)
    *_, last, total = rows
    assert last in ("first image", "answer") and total == "total", "encoding may be done before all is drawn"
    assert abs(sum(rows.values()) - 2 * rows["total"]) < 0.01, "the rows are the total, up to rounding"
    assert ("warm-up" in rows) == (way == "eager"), "a job that waits is not kept waiting for a warm-up"
    assert worker_run.log.count("cold start {") == 1 and "torch   " in worker_run.log, (
        "a line for machines, a table for people")


SLOW_LOAD = """
import multiprocessing, os, time
import sdworker.serve.handler, sdworker.start.load
pings = multiprocessing.Value("i", lock=False)  # shared with the heartbeat's process
def before_fork():
    print("forked with threads:", len(os.listdir("/proc/self/task")), flush=True)
    from runpod.serverless.modules.rp_ping import Heartbeat
    send = Heartbeat._send_ping
    def counted(heartbeat):
        send(heartbeat)
        pings.value += 1
    Heartbeat._send_ping = counted
os.register_at_fork(before=before_fork)
place = sdworker.start.load.place
def slowly(*arguments):  # in the loading thread, in the middle of the imports
    print("loading began", flush=True)
    seen = pings.value
    while pings.value < seen + 2:
        time.sleep(0.02)
    return place(*arguments)
sdworker.start.load.place = slowly
sdworker.serve.handler.start()
"""


@pytest.mark.parametrize("way", ["background", "eager", "lazy"])
def test_the_heartbeat_is_forked_before_the_load_and_goes_on_through_it(way):
    worker_run = run_workers([sys.executable, "-c", SLOW_LOAD], [job("first")], {"SDWORKER_LOAD": way})
    assert worker_run.log.count("forked with threads") == 1, (
        "the SDK forks once, or else otherwise than this worker expects")
    assert "forked with threads: 1\n" in worker_run.log, "another thread could hold a lock that the child inherits"
    assert worker_run.log.index("forked with threads") < worker_run.log.index("Loading model...")
    pings = [ping for ping in worker_run.pings if ping < worker_run.answered_at["first"]]
    assert len(pings) >= 2, "the load waited for two"
    assert "output" in worker_run.answers["first"], "the job waited for the load that was under way"
    assert worker_run.log.count("Loading model...") == 1
