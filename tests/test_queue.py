"""`.runpod/handler.py`, the production loop of the unmodified SDK, against a queue on 127.0.0.1."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs

from aiohttp import web

from sdworker.demo import free_port
from sdworker.embedded import judge
from sdworker.images import from_data_uri

PROMPT = "a large red star on a blue background"
HANDLER = Path(__file__).parent.parent / ".runpod" / "handler.py"  # what RunPod starts


class Queue:
    """The part of RunPod's protocol that a worker with one job at a time uses."""

    def __init__(self, jobs: list[dict]):
        self.waiting, self.expected = list(jobs), len(jobs)
        self.answers: dict[str, dict] = {}
        self.pings: list[float] = []  # when each came, seconds
        self.done, self.finished = asyncio.Event(), 0.0

    async def take(self, request):
        if not self.waiting:
            await asyncio.sleep(0.2)
            return web.Response(status=204)
        return web.json_response(self.waiting.pop(0))

    async def answer(self, request):
        body = await request.text()
        try:
            found = json.loads(body)
        except ValueError:
            found = json.loads(next(iter(parse_qs(body))))
        self.answers[request.match_info["job"]] = found
        if len(self.answers) == self.expected:
            self.finished = time.monotonic()
            self.done.set()
        return web.Response()

    async def ping(self, request):
        self.pings.append(time.monotonic())
        return web.Response()

    async def nothing(self, request):
        return web.Response(status=204)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_get("/v2/endpoint/job-take/{worker}", self.take)
        app.router.add_post("/v2/endpoint/job-done/{worker}/{job}", self.answer)
        app.router.add_get("/v2/endpoint/ping/{worker}", self.ping)
        app.router.add_get("/{rest:.*}", self.nothing)
        return app


async def work_through(queue: Queue, command: list = (HANDLER,)) -> str:
    """Run a worker until the queue's jobs are answered; what it logged."""
    port = free_port()
    runner = web.AppRunner(queue.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    base = f"http://127.0.0.1:{port}/v2/endpoint"
    environment = os.environ | {
        "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$RUNPOD_POD_ID?gpu=none", "RUNPOD_POD_ID": "worker",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
        "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID", "RUNPOD_AI_API_KEY": "none",
        "RUNPOD_PING_INTERVAL": "1000",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true",
    }
    worker = subprocess.Popen([sys.executable, *command], env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        await asyncio.wait_for(queue.done.wait(), 120)
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            log = (await asyncio.to_thread(worker.communicate, timeout=20))[0]
        except subprocess.TimeoutExpired:
            worker.kill()
            log = worker.communicate()[0]
        await runner.cleanup()
    return log


def test_production_loop_answers_good_and_bad_jobs():
    queue = Queue([
        {"id": "bad", "input": {"prompt": PROMPT, "width": 100}},
        {"id": "good", "input": {"prompt": PROMPT, "seed": 7}},
        {"id": "worse", "input": {"prompt": [PROMPT, 5]}},
        {"id": "again", "input": {"prompt": PROMPT, "seed": 7}},
    ])
    log = asyncio.run(work_through(queue))
    answers = queue.answers
    assert answers["bad"]["error"].startswith("width is 100")
    assert answers["worse"]["error"].startswith("prompt should be text")
    image = answers["good"]["output"]["images"][0]
    assert all(judge(from_data_uri(image), PROMPT).values())
    assert answers["again"]["output"]["images"][0] == image, "one process, one seed, one picture"
    assert log.count("Loading model...") == 1 and "refresh_worker" not in log
    assert PROMPT not in log and "base64" not in log, "neither prompts nor pictures in the log"


SLOW_LOAD = """
import os, threading, time
os.register_at_fork(before=lambda: print("forked with threads:", threading.active_count(), flush=True))
import sdworker.handler, sdworker.load
place = sdworker.load.place
def slowly(chosen):  # in the loading thread, before anything heavy is there
    print("loading began", flush=True)
    time.sleep(4)
    return place(chosen)
sdworker.load.place = slowly
sdworker.handler.start()
"""


def test_the_heartbeat_is_forked_before_the_background_load_and_goes_on_through_it():
    queue = Queue([{"id": "first", "input": {"prompt": PROMPT, "seed": 7}}])
    log = asyncio.run(work_through(queue, ["-c", SLOW_LOAD]))
    assert log.count("forked with threads") == 1, "the SDK forks once, or else otherwise than this worker expects"
    assert "forked with threads: 1\n" in log, "another thread could hold a lock that the child inherits"
    assert log.index("forked with threads") < log.index("loading began")
    gaps = [later - earlier for earlier, later in itertools.pairwise([*queue.pings, queue.finished])]
    assert len(gaps) >= 3 and max(gaps) < 3, "a ping each second, also while the model was loading"
    assert "output" in queue.answers["first"], "the job waited for the load that was under way"
    assert log.count("Loading model...") == 1
