"""`sdworker http` as a process, over real HTTP, with OpenAI's client where that speaks its dialect."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue

import httpx
import pytest
from handled import PROMPT
from openai import BadRequestError, InternalServerError, NotFoundError, OpenAI, RateLimitError
from PIL import Image

from sdworker.embedded.shapes import judge
from sdworker.lab.demo import free_port
from sdworker.lab.queue_server import bytes_in_use
from sdworker.lab.soak import PROMPTS, memory_growth

BODY = json.dumps({"prompt": PROMPT}).encode()
LONG = {"prompt": PROMPT, "num_images": 8, "num_inference_steps": 100}
MAIN = "from sdworker.cli.main import main; main()"
GATED = """
import time
from pathlib import Path
import sdworker.{module} as module
real = module.{name}
def when_open(*arguments):
    Path({gate!r}).with_suffix(".reached").touch()
    while not Path({gate!r}).exists():
        time.sleep(0.01)
    return real(*arguments)
module.{name} = when_open
"""
LOST = """
import sdworker.{module} as module
from sdworker.core.model_info import ModelError
def lost(*arguments):
    raise ModelError("the GPU takes no more work from this process.", lasting=True)
module.{name} = lost
"""
OFTEN = "import sdworker.engine.previews as previews; previews.INTERVAL = previews.LAST = previews.SHARE = 0.0\n"


@dataclass
class Worker:
    url: str
    process: subprocess.Popen
    log: Path
    http: httpx.Client

    def ping(self) -> int:
        return self.http.get("/ping").status_code

    def post(self, path: str = "/generate", **fields) -> httpx.Response:
        return self.http.post(path, json={"prompt": PROMPT} | fields)

    def metric(self, name: str) -> float:
        match = re.search(rf"(?m)^sdworker_{re.escape(name)} (\S+)$", self.http.get("/metrics").text)
        return float(match[1]) if match else 0.0

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=120)


def opened(worker: Worker, body: bytes, length: int) -> socket.socket:
    "A connection with a request, of whose body not all may have been sent."
    client = socket.create_connection(("127.0.0.1", worker.http.base_url.port), timeout=60)
    client.sendall(b"POST /generate HTTP/1.1\r\nHost: w\r\nContent-Type: application/json\r\n"
                   b"Content-Length: %d\r\n\r\n%s" % (length, body))
    return client


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


@contextmanager
def running(folder: Path, before: str = "", ready: tuple[int, ...] = (200,), **environment: str) -> Iterator[Worker]:
    """A worker; before: code that its process runs first; ready: statuses of /ping to wait for."""
    port, log = free_port(), folder / "worker.log"
    with log.open("w") as stream, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120,
                                               trust_env=False) as http:
        process = subprocess.Popen([sys.executable, "-c", before + MAIN, "http", "--port", str(port)],
                                   env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=stream,
                                   stderr=subprocess.STDOUT)
        worker = Worker(f"http://127.0.0.1:{port}", process, log, http)

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            with suppress(httpx.TransportError):
                return worker.ping() in ready
        try:
            wait_until(is_ready)
            yield worker
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with running(tmp_path_factory.mktemp("http"), OFTEN) as worker:
        yield worker


def picture(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text))).convert("RGB")


def test_openais_client_draws_and_edits(worker):
    client = worker.openai()
    drawn = client.images.generate(prompt=PROMPT, model="embedded", n=2, size="64x64", extra_body={"seed": 7})
    assert drawn.seeds == [7, 8] and drawn.warnings == []
    assert all(judge(picture(drawn.data[0].b64_json), PROMPT).values())
    data, few = base64.b64decode(drawn.data[0].b64_json), {"strength": 0.5, "seed": 3, "num_inference_steps": 4}
    for image in (data, [data], ("star.png", BytesIO(data), "image/png")):
        edited = client.images.edit(image=image, prompt=PROMPT, n=1, extra_body=few)
        assert edited.seeds == [3], "a form's texts become numbers"
    as_json = worker.post("/v1/images/edits", image=drawn.data[0].b64_json, **few)
    assert as_json.json()["data"][0]["b64_json"] == edited.data[0].b64_json
    assert as_json.headers["x-request-id"] in worker.log.read_text()


def test_the_model_is_listed(worker):
    client = worker.openai()
    assert [model.id for model in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").object == "model"
    with pytest.raises(NotFoundError, match="draws with embedded alone"):
        client.models.retrieve("gpt-image-1")


def test_two_hundred_requests_of_openais_client_from_eight_connections(worker):
    """Each of the threads has a client, and so a connection, of its own."""
    clients = SimpleQueue()
    for _ in range(8):
        clients.put(worker.openai())
    def draw(k: int) -> tuple[str, Image.Image]:
        client, prompt = clients.get(), PROMPTS[k % 3]
        try:
            answer = client.images.generate(prompt=prompt, size="64x64",
                                            extra_body={"seed": k, "num_inference_steps": 25})
        finally:
            clients.put(client)
        return prompt, picture(answer.data[0].b64_json)
    drawn, memory = [], []
    with ThreadPoolExecutor(8) as pool:
        for one in pool.map(draw, range(200)):
            drawn.append(one)
            memory.append((len(drawn), bytes_in_use(worker.process.pid)))
    print("memory:", round(memory_growth(memory), 3))
    assert [prompt for prompt, image in drawn if not all(judge(image, prompt).values())] == []
    assert worker.metric("requests_in_flight") == 0


def test_errors_have_openais_shape(worker):
    with pytest.raises(BadRequestError) as refused:
        worker.openai().images.generate(prompt=PROMPT, size="65x64")
    assert (refused.value.param, refused.value.code, refused.value.type) == (
        "size", "invalid_request", "invalid_request_error") and "multiple of 8" in refused.value.message
    with pytest.raises(BadRequestError, match="image is missing"):
        worker.openai().images.edit(image=b"", prompt=PROMPT)
    assert worker.http.get("/v1/files").json()["error"]["code"] == "not_found"
    assert worker.http.get("/v1/images/edits").status_code == 405


@pytest.mark.parametrize(("content", "kind", "status", "message"), [
    (b'{"prompt": "x", "width": 65}', "application/json", 400, "width is 65: should be a multiple of 8"),
    (b"{", "application/json", 400, "the body is not valid JSON"),
    (b"null", "application/json", 400, "the body should be an object"),
    (b'{"prompt": NaN}', "application/json", 400, "prompt should be text"),
    (b"prompt=x", "application/x-www-form-urlencoded", 415, "the body should be JSON"),
])
def test_errors_have_this_workers_own_shape(worker, content, kind, status, message):
    answer = worker.http.post("/generate", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status and set(answer.json()) == {"error", "code", "field"}
    assert answer.json()["error"].startswith(message)
    assert worker.http.get("/nowhere").json()["code"] == "not_found" and worker.ping() == 200


def test_openais_stream(worker):
    stream = worker.openai().images.generate(prompt=PROMPT, stream=True, partial_images=2, n=2,
                                             extra_body={"seed": 7, "num_inference_steps": 50})
    events = list(stream)
    assert [event.type.partition(".")[2] for event in events] == ["partial_image"] * 2 + ["completed"] * 2
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert "{}x{}".format(*picture(events[0].b64_json).size) == events[0].size and events[0].output_format == "jpeg"
    assert all(judge(picture(events[2].b64_json), PROMPT).values()) and events[2].usage.total_tokens == 0
    with pytest.raises(BadRequestError, match="partial_images should be"):
        worker.openai().images.generate(prompt=PROMPT, stream=True, partial_images=7)
    with pytest.raises(BadRequestError, match="prompt should not be empty"):
        worker.openai().images.generate(prompt="", stream=True)
    plain = worker.openai().images.generate(prompt=PROMPT, partial_images=2)
    assert plain.warnings == ["partial_images is not used: only the finished picture is sent."]


def test_an_edits_stream(worker):
    data = BytesIO()
    Image.new("RGB", (64, 64), "blue").save(data, "png")
    events = list(worker.openai().images.edit(image=data.getvalue(), prompt=PROMPT, stream=True,
                                              extra_body={"num_inference_steps": 4}))
    assert [event.type for event in events] == ["image_edit.completed"]


def test_progress_of_this_workers_own_requests(worker):
    body = {"prompt": PROMPT, "previews": True, "num_inference_steps": 50}
    answer = worker.http.post("/generate", json=body, headers={"Accept": "text/event-stream"})
    events = [(name, json.loads(data)) for name, data in re.findall(r"event: (\w+)\ndata: (.*)\n\n", answer.text)]
    names = [name for name, _ in events]
    assert names == ["progress"] * (len(events) - 1) + ["answer"] and len(events) > 2
    assert events[0][1]["steps"] == 50 and events[0][1]["preview"].startswith("data:image/jpeg;base64,")
    assert len(events[-1][1]["images"]) == 1


def test_a_client_that_goes_away_takes_its_job_with_it(worker):
    before = worker.metric('jobs_total{outcome="stopped"}')
    with worker.http.stream("POST", "/generate", json=LONG, headers={"Accept": "text/event-stream"}) as response:
        assert next(response.iter_lines()) == "event: progress"
    wait_until(lambda: worker.metric('jobs_total{outcome="stopped"}') == before + 1)
    with suppress(httpx.ReadTimeout):
        httpx.post(f"{worker.url}/generate", json=LONG, timeout=httpx.Timeout(60, read=0.5), trust_env=False)
    wait_until(lambda: worker.metric('jobs_total{outcome="stopped"}') == before + 2)
    assert worker.metric("requests_waiting") == 0 and worker.metric('http_responses_total{status="499"}') == 1
    assert "stopped: cancelled" in worker.log.read_text()


def test_a_body_over_the_limit_is_not_read(worker):
    with socket.create_connection(("127.0.0.1", int(worker.url.rpartition(":")[2])), timeout=60) as connection:
        connection.sendall(b"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 30000001\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413"), "before the body has come"
    chunks = (b" " * 1_000_000 for _ in range(31))
    answer = worker.http.post("/generate", content=chunks, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and answer.json()["code"] == "too_large"
    assert worker.post().status_code == 200


def test_no_prompt_is_logged(worker):
    worker.post("/v1/images/generations")
    worker.http.get(f"/{PROMPT}?prompt={PROMPT}")
    worker.http.get(f"/v1/models/{PROMPT}")
    assert "large" not in worker.log.read_text() and "POST /v1/images/generations: 200" in worker.log.read_text()


def test_metrics_are_prometheus_text(worker):
    answer = worker.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in answer.text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) sdworker_\w+ .+|sdworker_\w+(\{\w+="\w+"\})? [\d.]+', line), line
    images = worker.metric("images_total")
    worker.post(num_images=3, num_inference_steps=2)
    assert worker.metric("images_total") == images + 3 and worker.metric("engine_seconds_total") > 0


def test_ping_while_the_model_loads(tmp_path):
    gate = tmp_path / "gate"
    before = GATED.format(module="start.load", name="_loaded", gate=str(gate))
    health = free_port()
    with running(tmp_path, before, ready=(404,), PORT_HEALTH=str(health), HEALTH_CHECK_PATH="/health") as worker:
        def ping() -> int:
            return httpx.get(f"http://127.0.0.1:{health}/health", trust_env=False).status_code
        assert ping() == worker.http.get("/health").status_code == 204
        gate.touch()
        wait_until(lambda: ping() == 200)
        assert httpx.get(f"http://127.0.0.1:{health}/metrics", trust_env=False).status_code == 404
        assert worker.post(num_inference_steps=2).status_code == 200


def test_a_full_queue(tmp_path):
    gate = tmp_path / "gate"
    before = GATED.format(module="engine.generate", name="draw_next", gate=str(gate))
    with running(tmp_path, before, SDWORKER_HTTP_QUEUE="1", SDWORKER_LOAD="lazy") as worker, \
            ThreadPoolExecutor(1) as pool:
        first = pool.submit(worker.post)
        wait_until(lambda: worker.metric("requests_waiting") == 1)
        try:
            with pytest.raises(RateLimitError) as refused:
                worker.openai().images.generate(prompt=PROMPT)
            assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
            assert refused.value.code == "queue_full" and worker.post().json()["code"] == "queue_full"
        finally:
            gate.touch()
        assert first.result().status_code == 200 and worker.post().status_code == 200


@pytest.mark.parametrize("load", ["background", "eager"])
def test_a_load_that_fails_for_good(tmp_path, load):
    before = LOST.format(module="start.load", name="_load")
    with pytest.raises(AssertionError, match="takes no more work"), running(tmp_path, before, SDWORKER_LOAD=load):
        pass
    log = (tmp_path / "worker.log").read_text()
    assert "Traceback" not in log and "the reason is above" in log


def test_a_load_that_fails_for_good_while_a_request_waits(tmp_path):
    before = LOST.format(module="start.load", name="_load")
    with running(tmp_path, before, SDWORKER_LOAD="lazy") as worker:
        with pytest.raises(InternalServerError, match="the GPU takes no more work") as lost:
            worker.openai().images.generate(prompt=PROMPT)
        assert lost.value.response.headers["retry-after"] == "1", "another worker may have more luck"
        assert worker.process.wait(60) == 1 and "Traceback" not in worker.log.read_text()


def test_an_engine_that_is_lost_when_its_client_has_gone(tmp_path):
    gate = tmp_path / "gate"
    before = LOST.format(module="engine.generate", name="draw_next")
    before += GATED.format(module="engine.generate", name="draw_next", gate=str(gate))
    with running(tmp_path, before, SDWORKER_LOAD="lazy") as worker:
        with opened(worker, BODY, len(BODY)):
            wait_until(gate.with_suffix(".reached").exists)
        wait_until(lambda: worker.metric("requests_in_flight") == 0)
        gate.touch()
        assert worker.process.wait(60) == 1 and "can draw no more, and ends" in worker.log.read_text()


def test_an_engine_that_is_lost_while_it_draws(tmp_path):
    gate = tmp_path / "gate"
    before = LOST.format(module="engine.generate", name="draw_next")
    before += GATED.format(module="engine.generate", name="draw_next", gate=str(gate))
    with running(tmp_path, before, SDWORKER_LOAD="lazy") as worker, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(worker.post) for _ in range(2)]
        wait_until(lambda: worker.metric("requests_waiting") == 2)
        gate.touch()
        assert [job.result().status_code for job in jobs] == [503, 503], "all that wait are answered"
        assert "refresh_worker" not in jobs[0].result().json()
        assert worker.process.wait(60) == 1 and "can draw no more, and ends" in worker.log.read_text()


HANGING = """
import atexit, threading, sdworker.engine.generate
never = threading.Event()
atexit.register(never.wait)  # as a driver that waits for its kernels
sdworker.engine.generate.draw_next = lambda drawings, max_batch: never.wait()
"""


def test_a_step_that_hangs(tmp_path):
    with running(tmp_path, HANGING, SDWORKER_LOAD="lazy", SDWORKER_STEP_TIMEOUT="2") as worker, \
            ThreadPoolExecutor(2) as pool:
        answers = [job.result() for job in [pool.submit(worker.post) for _ in range(2)]]
        assert [answer.status_code for answer in answers] == [503, 503]
        assert answers[0].json()["error"].startswith("a step took more than 2 s, so this worker ends")
        assert worker.process.wait(60) == 1, "it does not wait for the driver"


def test_sigterm_lets_the_requests_in_flight_be_drawn(tmp_path):
    gate = tmp_path / "gate"
    before = GATED.format(module="engine.generate", name="draw_next", gate=str(gate))
    with running(tmp_path, before, SDWORKER_LOAD="lazy") as worker, ThreadPoolExecutor(1) as pool:
        job = pool.submit(worker.post)
        wait_until(lambda: worker.metric("requests_waiting") == 1)
        worker.process.send_signal(signal.SIGTERM)
        try:
            wait_until(lambda: worker.ping() == 503)
            with pytest.raises(InternalServerError, match="this worker stops"):
                worker.openai().images.generate(prompt=PROMPT)
        finally:
            gate.touch()
        assert job.result().status_code == 200 and worker.process.wait(60) == 0


def test_sigterm_stops_what_takes_too_long(tmp_path):
    before = "import sdworker.serve.http_server as server; server.drain.__defaults__ = (0.2,)\n" + OFTEN
    with running(tmp_path, before) as worker:
        with worker.http.stream("POST", "/generate", json=LONG, headers={"Accept": "text/event-stream"}) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: progress"
            worker.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-2:]
        assert last[0] == "event: answer" and json.loads(last[1].removeprefix("data: "))["code"] == "stopping"
        assert worker.process.wait(60) == 0


def test_sigterm_does_not_wait_for_a_body(tmp_path):
    with running(tmp_path) as worker, opened(worker, BODY[:5], len(BODY)) as client:
        wait_until(lambda: worker.metric("requests_in_flight") == 1)
        worker.process.send_signal(signal.SIGTERM)
        answer = b"".join(iter(lambda: client.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer and b'"stopping"' in answer
        assert worker.process.wait(60) == 0 and "Traceback" not in worker.log.read_text()


HANGING_DELIVERY = """
import pathlib, threading, sdworker.serve.answer
sdworker.serve.answer.deliver = lambda *_: (pathlib.Path({reached!r}).touch(), threading.Event().wait())
"""


def test_an_upload_that_nobody_waits_for_does_not_keep_the_process(tmp_path):
    reached = tmp_path / "reached"
    with running(tmp_path, HANGING_DELIVERY.format(reached=str(reached))) as worker:
        with opened(worker, BODY, len(BODY)):
            wait_until(reached.exists)
        wait_until(lambda: worker.metric("requests_in_flight") == 0)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(60) == 0


@pytest.mark.parametrize(("environment", "message"), [
    ({"PORT": "http"}, "PORT is 'http': should be a TCP port from 1 to 65535."),
    ({"HEALTH_CHECK_PATH": "ping"}, "HEALTH_CHECK_PATH is 'ping'"),
    ({"SDWORKER_HTTP_QUEUE": "0"}, "SDWORKER_HTTP_QUEUE is '0'"),
    ({"SDWORKER_MODEL": "/no/such/folder", "PORT": str(free_port())}, "there is no such folder"),
])
def test_a_wrong_setting_ends_the_start(environment, message):
    done = subprocess.run([sys.executable, "-m", "sdworker.cli.main", "http"], env=os.environ | environment,
                          capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["sdworker.serve.handler", "sdworker.cli.main", "sdworker.serve.http_server"])
def test_the_server_is_imported_by_its_command_alone(module):
    code = f"import sys, {module}; sys.exit(', '.join({{'fastapi', 'starlette', 'uvicorn'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
