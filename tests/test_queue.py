"""`.runpod/handler.py`, the production loop of the unmodified SDK, at a queue on 127.0.0.1."""

import json
import sys
import time

import numpy as np
import pytest
from handled import HANDLER, PROMPT, job

from sdworker.embedded.shapes import judge
from sdworker.lab.queue_server import Fault, run_workers
from sdworker.serve.image_io import from_data_uri


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


SLOW_STEPS = """
import time, sdworker.engine.previews, sdworker.serve.handler, sdworker.serve.sdk
progress = sdworker.engine.previews.progress
def slow_progress(*arguments):
    on_step = progress(*arguments)
    def on_slow_step(*state):
        time.sleep(0.02)
        on_step(*state)
    return on_slow_step
sdworker.engine.previews.progress = slow_progress
"""


def test_previews_come_while_a_picture_is_drawn():
    worker_run = run_workers([sys.executable, "-c", SLOW_STEPS + "sdworker.serve.handler.start()"],
                             [job("seen", previews=True, n=4, num_inference_steps=100),
                              job("plain", num_inference_steps=1)])
    messages = worker_run.progress["seen"]
    steps = [message["step"] for message in messages]
    assert steps == sorted(set(steps)) and steps[-1] < messages[-1]["steps"] == 400
    for message in messages:
        assert message["seconds_left"] >= 1 and len(message["preview"]) < 64_000
        assert from_data_uri(message["preview"]).size == (32, 32)
    assert worker_run.answers["seen"]["output"]["warnings"] == [] and "plain" not in worker_run.progress


IN_PIECES = SLOW_STEPS + """
sdworker.serve.sdk.PART_CHARS = 10_000
sdworker.serve.handler.start()
"""


def test_an_answer_comes_in_parts_on_the_stream():
    worker_run = run_workers([sys.executable, "-c", IN_PIECES], [
        job("seen", previews=True, num_images=8, num_inference_steps=100), job("bad", width=100)],
        {"SDWORKER_STREAM": "1"})
    parts = [chunk["output"] for chunk in worker_run.stream["seen"]]
    assert worker_run.answers["seen"]["output"] == parts, "also as a whole, for those who ask for the status"
    steps = [part["progress"]["step"] for part in parts if "progress" in part]
    assert steps == sorted(set(steps)) and steps and "preview" in parts[0]["progress"]
    pieces = [part for part in parts if "json" in part]
    assert pieces == parts[len(steps):] and [piece["part"] for piece in pieces] == [*range(1, pieces[0]["parts"] + 1)]
    answer = json.loads("".join(piece["json"] for piece in pieces))
    assert len(answer["images"]) == 8 and all(judge(from_data_uri(answer["images"][0]), PROMPT).values())
    assert worker_run.answers["bad"]["error"].startswith("width is 100") and "seen" not in worker_run.progress


def test_jobs_that_wait_are_drawn_together_and_come_out_as_alone():
    alone = run_workers(HANDLER, [job("a"), job("b", seed=8), job("c", seed=9)])
    together = run_workers(HANDLER, [job("a"), job("b", seed=8), job("c", seed=9)], {
        "SDWORKER_CONCURRENCY": "3", "SDWORKER_LOAD": "lazy"})
    for name in "abc":
        one, other = (np.asarray(from_data_uri(worker_run.answers[name]["output"]["images"][0]), int)
                      for worker_run in (alone, together))
        assert abs(one - other).max() <= 2, "of 255"
    timings = [together.answers[name]["output"]["timings"] for name in "abc"]
    assert len({timing["denoise"] for timing in timings}) == 1, "one batch, whose time is that of each job"
    for timing in timings:
        of_batch = sum(timing[stage] for stage in ("text_encoder", "denoise", "decode"))
        assert abs(timing["engine"] - of_batch / 3) < 0.001, "and a third of it is each job's share"


ONE_THREAD = """
import threading
from unittest.mock import patch
import sdworker.serve.handler
from sdworker.engine.pipeline import FamilyEngine
def only_there(name, original):
    def call(*args, **kwargs):
        assert threading.current_thread().name == "engine", name
        print("in the engine's thread:", name, flush=True)
        return original(*args, **kwargs)
    return call
for name in ("__init__", "encode", "denoise", "decode", "route", "text_chunks"):
    setattr(FamilyEngine, name, only_there(name, getattr(FamilyEngine, name)))
sdworker.serve.handler.start()
"""


def test_only_the_engines_thread_touches_the_engine():
    jobs = [job(f"job-{k}", width=32 + 32 * (k % 2), previews=True) for k in range(6)] + [job("bad", width=100)]
    worker_run = run_workers([sys.executable, "-c", ONE_THREAD], jobs, {"SDWORKER_CONCURRENCY": "4"})
    assert all("output" in worker_run.answers[f"job-{k}"] for k in range(6)), worker_run.log
    for name in ("__init__", "encode", "denoise", "decode", "route", "text_chunks"):
        assert f"in the engine's thread: {name}" in worker_run.log


SECOND_FIRST = """
import asyncio, sdworker.serve.handler
connect, posted = sdworker.serve.handler.connect, asyncio.Event()
def connect_and_hold_back(gate):
    from runpod.serverless.modules import rp_http
    transmit = rp_http._transmit
    async def second_first(session, url, data):
        answer = "images" in data  # else a message of progress, on a busy machine
        if answer and "/first" in url:
            await posted.wait()
        await transmit(session, url, data)
        if answer:
            posted.set()
    rp_http._transmit = second_first
    connect(gate)
sdworker.serve.handler.connect = connect_and_hold_back
sdworker.serve.handler.start()
"""


def test_the_next_job_is_taken_before_the_answer_of_the_last_is_out():
    """Without waiting for a slow result to be posted."""
    worker_run = run_workers([sys.executable, "-c", SECOND_FIRST], [job("first"), job("second")])
    assert worker_run.answered_at["second"] < worker_run.answered_at["first"]


def test_the_sdk_never_thinks_that_the_worker_is_full():
    """It would sleep for a second. It counts a job that it has not dispatched yet twice."""
    worker_run = run_workers(HANDLER, [job(f"job-{k}") for k in range(8)], {
        "SDWORKER_LOAD": "eager", "SDWORKER_CONCURRENCY": "8", "RUNPOD_LOG_LEVEL": "DEBUG"})
    assert len(worker_run.answers) == 8 and "Starting job acquisition" in worker_run.log
    assert "Queue is full" not in worker_run.log


TOGETHER = """
import asyncio, time, sdworker.serve.handler
from sdworker.serve.batching import Batching
turn, connect, begun, in_the_middle = Batching._turn, sdworker.serve.handler.connect, [], []
def when_two_wait(self):
    import sdworker.engine.generate as generate
    while not begun and len(self._arrived) < 2:
        time.sleep(0.01)
    if not begun:
        generate._reporter = reporter(generate._reporter)
    begun.append(True)
    return turn(self)
def reporter(original):
    def begin(engine, shares):
        report = original(engine, shares)
        def report_and_wait(done, total, latents):
            report(done, total, latents)
            if len(shares) == 2:
                print("step of two:", done, sum(not drawing.error for drawing in shares), flush=True)
            if done == total // 2 and len(shares) == 2 and {cancelled}:
                in_the_middle.append(True)
                while not any(drawing.error for drawing in shares):
                    time.sleep(0.01)
        return report_and_wait
    return begin
def connect_and_hold_back(gate):
    from runpod.serverless.modules import rp_scale
    ask = rp_scale.get_stop_signals
    async def ask_in_the_middle(session):
        while {cancelled} and not in_the_middle:
            await asyncio.sleep(0.01)
        return await ask(session)
    rp_scale.get_stop_signals = ask_in_the_middle
    connect(gate)
Batching._turn, sdworker.serve.handler.connect = when_two_wait, connect_and_hold_back
sdworker.serve.handler.start()
"""


def test_a_cancelled_job_ends_and_its_batch_mate_is_the_same_to_the_bit():
    jobs = [job("mate"), job("cancelled", seed=8, num_images=3), job("next")]
    undisturbed, disturbed = (
        run_workers([sys.executable, "-c", TOGETHER.format(cancelled=bool(cancel))], jobs,
                    {"SDWORKER_CONCURRENCY": "2", "SDWORKER_LOAD": "eager"}, cancel=cancel)
        for cancel in (None, {"cancelled": 0.0}))
    for worker_run in (undisturbed, disturbed):
        timings = worker_run.answers["mate"]["output"]["timings"]
        assert timings["engine"] < timings["denoise"] and "step of two: 1 2" in worker_run.log, "they shared a batch"
    one, other = (worker_run.answers["mate"]["output"]["images"] for worker_run in (undisturbed, disturbed))
    assert one == other and "output" in disturbed.answers["next"]
    assert "cancelled" not in disturbed.answers and "job cancelled stopped" in disturbed.log, disturbed.log


SOON = """
import sdworker.serve.answer, sdworker.serve.handler
seconds_left = sdworker.serve.answer._seconds_left
sdworker.serve.answer._seconds_left = lambda request: seconds_left(request) and 1.0  # the next job has no deadline
sdworker.serve.handler.start()
"""


def test_a_deadline_is_kept():
    late = {"deadline": time.time() + 3600, "num_images": 256, "num_inference_steps": 1000}  # minutes of work
    worker_run = run_workers([sys.executable, "-c", SOON],
                             [job("late", **late), job("over", deadline=1.0), job("next")],
                             {"SDWORKER_MAX_IMAGES": "256", "SDWORKER_MAX_STEPS": "1000",
                              "SDWORKER_MAX_MEGAPIXEL_STEPS": "1000000", "SDWORKER_LOAD": "eager"})
    for name in ("late", "over"):
        assert worker_run.answers[name]["output"]["code"] == "expired"
    assert worker_run.answers["late"]["error"].startswith("deadline has passed, and the job was not done")
    assert worker_run.answers["over"]["error"].startswith("deadline has passed before the job was taken")
    assert "output" in worker_run.answers["next"]


WHEN_IT_CAME_TWICE = """
import threading, sdworker.serve.handler
from sdworker.serve.batching import Batching
from sdworker.serve.sdk import JobGate
turn, begin, names, twice = Batching._turn, JobGate.begin, [], threading.Event()
def begin_and_note(gate, job):
    names.append(job["id"])
    if names.count("twice") > 2:  # taken, and by the SDK, and taken again
        twice.set()
    return begin(gate, job)
def when_it_came_twice(self):
    twice.wait()
    return turn(self)
Batching._turn, JobGate.begin = when_it_came_twice, begin_and_note
sdworker.serve.handler.start()
"""


def test_a_job_that_comes_twice_is_drawn_once_and_answered_twice():
    worker_run = run_workers([sys.executable, "-c", WHEN_IT_CAME_TWICE], [job("twice", num_images=4), job("other")],
                             {"SDWORKER_CONCURRENCY": "3"}, lease=1.0, faults=[Fault("ping", reset=True)])
    assert worker_run.deliveries["twice"] > 1 and worker_run.answer_count["twice"] == worker_run.deliveries["twice"]
    assert worker_run.log.count("job twice: 4 image(s)") == 1, worker_run.log


@pytest.mark.parametrize("fault", [Fault("job-done", reset=True, first=2), Fault("job-done", status=503, first=5)])
def test_a_result_is_posted_again_while_the_queue_does_not_take_it(fault):
    worker_run = run_workers(HANDLER, [job("only")], faults=[fault])
    assert "images" in worker_run.answers["only"]["output"] and worker_run.answer_count["only"] == 1
    assert "Failed to return job results" not in worker_run.log


STOPPED = """
import os, signal, sdworker.serve.handler
from sdworker.serve.batching import Batching
turn = Batching._turn
def signalled(self):
    os.kill(os.getpid(), signal.SIGTERM)
    return turn(self)
Batching._turn = signalled
sdworker.serve.handler.start()
"""


def test_a_worker_that_gets_sigterm_finishes_what_it_has_and_takes_no_more():
    worker_run = run_workers([sys.executable, "-c", STOPPED], [job("first"), job("second"), job("left")],
                             {"SDWORKER_CONCURRENCY": "2", "SDWORKER_LOAD": "eager"}, stop=False)
    assert "output" in worker_run.answers["first"] and set(worker_run.taken_at) == set(worker_run.answers)
    assert "left" not in worker_run.taken_at and worker_run.code == 0, worker_run.log


IDLE_AND_STOPPED = """
import os, signal, threading, sdworker.serve.handler, sdworker.serve.sdk
done = sdworker.serve.sdk.JobGate._done
def done_and_signalled(gate, name, task):
    done(gate, name, task)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
sdworker.serve.sdk.JobGate._done = done_and_signalled
sdworker.serve.handler.start()
"""


def test_an_idle_worker_that_gets_sigterm_does_not_wait_for_the_queue():
    worker_run = run_workers([sys.executable, "-c", IDLE_AND_STOPPED], [job("first")], limit=80, stop=False, hold=500)
    assert "output" in worker_run.answers["first"] and worker_run.code == 0, worker_run.log


STOPPED_IN_THE_LOAD = """
import os, signal, sdworker.serve.handler, sdworker.serve.sdk, sdworker.start.load
place, begin = sdworker.start.load.place, sdworker.serve.sdk.JobGate.begin
begun = sdworker.start.load.threading.Event()
def slowly(*arguments):
    begun.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    return place(*arguments)
def begin_and_note(gate, job):
    begun.set()
    return begin(gate, job)
sdworker.start.load.place, sdworker.serve.sdk.JobGate.begin = slowly, begin_and_note
sdworker.serve.handler.start()
"""


def test_a_worker_that_gets_sigterm_while_it_loads_draws_the_job_that_it_has():
    worker_run = run_workers([sys.executable, "-c", STOPPED_IN_THE_LOAD], [job("first"), job("left")], stop=False)
    assert "output" in worker_run.answers["first"] and set(worker_run.taken_at) == {"first"}, worker_run.log
    assert worker_run.code == 0


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
