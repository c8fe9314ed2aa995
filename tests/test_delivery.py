"""Pictures uploaded to a real S3 server on the loopback, and to one that refuses, breaks off, or answers late."""

import io
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import patch

import httpx
import numpy as np
import pytest
from handled import drawn_by
from moto.server import ThreadedMotoServer
from PIL import Image

from sdworker.core.settings import Settings, get_settings
from sdworker.operate import doctor
from sdworker.operate.client import ClientError, job_of
from sdworker.serve.delivery import Bucket, DeliveryError, Destination, bucket_of, deliver, open_bucket, upload
from sdworker.serve.fetch import MAX_SECONDS, fetch
from sdworker.serve.handler import handler
from sdworker.serve.image_io import encode

PICTURES = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (64, 48, 3), np.uint8)) for k in range(3)]
FILES = [encode(picture) for picture in PICTURES]
SEEDS = [7, 8, 9]


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    bucket = Bucket(f"http://127.0.0.1:{server.get_host_and_port()[1]}", "writer", "hidden-key", "pictures")
    open_bucket(bucket).create_bucket(Bucket="pictures")
    yield bucket
    server.stop()


def sent(bucket: Bucket, limit: int = 10**6) -> tuple[list[str], list[str]]:
    return deliver(FILES, "png", lambda quality: [encode(picture, "jpeg", quality) for picture in PICTURES], SEEDS,
                   Destination(bucket, True, limit, "job-1"))


def test_pictures_arrive_at_their_addresses(s3):
    addresses, warnings = sent(s3)
    assert not warnings and len(set(addresses)) == 3 and all("job-1/" in address for address in addresses)
    answers = [httpx.get(address, trust_env=False) for address in addresses]
    assert [answer.content for answer in answers] == FILES and answers[0].headers["Content-Type"] == "image/png"
    assert all("X-Amz-Expires=604800" in address and "hidden-key" not in address for address in addresses)


def test_the_client_saves_what_comes_as_an_address(s3, tmp_path):
    addresses, _ = sent(s3)
    job = job_of({"id": "a", "status": "COMPLETED", "output": {"images": addresses, "seeds": SEEDS}})
    assert [path.name for path in job.save(tmp_path)] == ["01-seed-7.png", "02-seed-8.png", "03-seed-9.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "02-seed-8.png")), np.asarray(PICTURES[1]))
    missing = {"images": [addresses[0].replace("01-", "99-")], "seeds": [7]}
    lost = job_of({"id": "a", "status": "COMPLETED", "output": missing})
    with pytest.raises(ClientError, match="cannot be fetched"):
        lost.save(tmp_path)


REFUSAL = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>wrong region</Message></Error>"
MALFORMED = b"<Error><Code><a>b</a></Code><Code>2</Code></Error>"
FAULTS = {  # what the server does -> what the warning says
    "403": "refuses the upload (AuthorizationHeaderMalformed)", "301": "refuses the upload",
    "400": "refuses the upload", "500": "refuses the upload", "redirect 301": "redirects to another address (301)",
    "redirect 307": "redirects to another address (307)", "malformed 403": "to the bucket pictures failed (",
    # moto takes a signature for any region, so a wrong one is tried here
    "region 301": "is in another region (eu-west-3)", "region 400": "is in another region (eu-west-3)",
    "reset": "cannot be reached", "slow": "cannot be reached", "drip": "did not take the pictures within 1 s",
}


@contextmanager
def broken(fault: str):
    "A server that is no good bucket, and the number of requests it had."
    requests = []

    class Broken(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            requests.append(self.command)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()
            elif fault == "slow":
                released.wait(60)
            elif fault == "drip":  # each byte is within the limit for an answer
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
                while not released.wait(0.2):
                    self.wfile.write(b"x")
            else:
                kind, _, status = fault.rpartition(" ")
                body = {"": REFUSAL, "malformed": MALFORMED}.get(kind, b"")
                self.send_response(int(status))
                if kind == "region" and status == "301":
                    self.send_header("x-amz-bucket-region", "eu-west-3")
                elif kind == "region":
                    body = REFUSAL.replace(b"</Error>", b"<Region>eu-west-3</Region></Error>")
                if kind == "redirect":
                    self.send_header("Location", "https://elsewhere.example/pictures?token=hidden-token")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        do_HEAD = do_PUT

        def log_message(self, *about: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                pass

    released = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Bucket(f"http://127.0.0.1:{server.server_port}", "writer", "hidden-key", "pictures"), requests
        released.set()
        server.shutdown()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_upload_leaves_the_pictures_in_the_answer(fault):
    from botocore.config import Config

    def impatient(**options):
        return Config(**options | {"read_timeout": 1, "connect_timeout": 1})

    with (broken(fault) as (bucket, requests), patch("botocore.config.Config", impatient),
          patch("sdworker.serve.delivery.MAX_UPLOAD_SECONDS", 1 if fault == "drip" else 100)):
        texts, warnings = sent(bucket)
        assert all(text.startswith("data:image/png") for text in texts) and len(requests) <= 3 * len(FILES)
        assert FAULTS[fault] in warnings[0] and "hidden" not in warnings[0] and set(requests) == {"PUT"}
        with pytest.raises(DeliveryError, match=r"at once, with seed \[7, 8, 9\]\.$"):
            sent(bucket, limit=1000)


@pytest.mark.parametrize("fault", ["redirect 301", "malformed 403"])
def test_a_jobs_pictures_and_its_log_survive_a_bucket_that_makes_boto3_fail(fault, monkeypatch, caplog):
    with broken(fault) as (bucket, _):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", bucket.endpoint)
        monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "writer")
        monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "hidden-key")
        answer = handler({"id": "a", "input": {
            "prompt": "a red star", "num_inference_steps": 1, "seed": 7, "delivery": "upload"}})
    assert answer["images"][0].startswith("data:image/png") and answer["seed"] == 7
    assert answer["warnings"][-1].startswith("Not uploaded, since the")
    logged = caplog.text + str(answer["warnings"])
    assert not any(word in logged for word in ("Traceback", "hidden", "elsewhere.example"))


def test_the_doctor_names_the_address_that_a_bucket_redirects_to(monkeypatch):
    with broken("redirect 301") as (bucket, _):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", bucket.endpoint)
        monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "writer")
        monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "hidden-key")
        finding = doctor.bucket(Settings())
    assert finding.detail == "the endpoint redirects to https://elsewhere.example/pictures."
    assert finding.remedy.startswith("Set that address, without the bucket's name (SDWORKER_BUCKET_ENDPOINT_URL")
    with broken("drip") as (bucket, _), patch("sdworker.operate.doctor.MAX_UPLOAD_SECONDS", 1):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", bucket.endpoint)
        assert "did not answer within 1 s" in doctor.bucket(Settings()).detail


STUCK = """
import sys
from sdworker.serve import delivery
delivery.MAX_UPLOAD_SECONDS = 1
bucket = delivery.Bucket(sys.argv[1], "writer", "hidden-key", "pictures")
target = delivery.Destination(bucket, True, 10**6, "job")
print(delivery.deliver([b"a file"], "png", lambda quality: [], [7], target)[1])
"""


def test_a_process_ends_though_an_upload_hangs():
    with broken("drip") as (bucket, requests):
        done = subprocess.run([sys.executable, "-c", STUCK, bucket.endpoint], text=True, timeout=50,
                              capture_output=True)
    assert done.returncode == 0 and "did not take the pictures within 1 s" in done.stdout and requests == ["PUT"]


def test_twenty_pictures_keep_their_order(s3):
    files = [f"file {seed}".encode() for seed in range(20)]
    addresses, _ = deliver(files, "png", lambda quality: [], range(20), Destination(s3, True, 10**6, "job-2"))
    assert [httpx.get(address, trust_env=False).content for address in addresses] == files


def test_a_fetch_waits_as_long_as_its_message_states():
    seconds = []
    with patch("sdworker.serve.fetch.Future.result", lambda self, timeout: seconds.append(timeout) or b""):
        fetch("http://8.8.8.8/", 10)
    assert seconds == [MAX_SECONDS]


def test_a_bucket_that_does_not_exist_is_named(s3):
    missing = Bucket(s3.endpoint, "writer", "hidden-key", "nowhere")
    with pytest.raises(DeliveryError, match=re.escape("nowhere refuses the upload (NoSuchBucket)")):
        upload(open_bucket(missing), missing, "x", b"x")


def test_a_job_uploads_by_the_sdks_variables(s3, monkeypatch):
    variables = {"BUCKET_ENDPOINT_URL": s3.endpoint, "BUCKET_ACCESS_KEY_ID": "writer",
                 "BUCKET_SECRET_ACCESS_KEY": "hidden-key", "SDWORKER_BUCKET_NAME": "pictures"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    try:
        assert bucket_of(get_settings(), variables).name == "pictures"
        answer = handler({"id": "../odd id", "input": {
            "prompt": "a red star", "num_inference_steps": 1, "seed": 7, "delivery": "upload"}})
        assert "/pictures/___odd_id/01-seed-7.png?" in answer["images"][0]
        assert httpx.get(answer["images"][0], trust_env=False).content.startswith(b"\x89PNG")
    finally:
        monkeypatch.undo()
        get_settings.cache_clear()


def test_eight_large_pictures_arrive_in_the_bucket(s3, monkeypatch):
    def noise(spec, params):
        noise = np.random.default_rng(spec.seed).integers(0, 255, (params.height, params.width, 3), np.uint8)
        drawn.append(Image.fromarray(noise))
        return drawn[-1]

    drawn, variables = [], {
        "BUCKET_ENDPOINT_URL": s3.endpoint, "BUCKET_ACCESS_KEY_ID": "writer", "BUCKET_SECRET_ACCESS_KEY": "hidden-key",
        "SDWORKER_BUCKET_NAME": "pictures", "RUNPOD_WEBHOOK_GET_JOB": "https://api.runpod.example"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    try:
        with drawn_by(noise):
            answer = handler({"id": "many", "input": {
                "prompt": "a star", "width": 1024, "height": 1024, "num_images": 8, "seed": 1, "image_format": "png",
                "num_inference_steps": 1}})
    finally:
        monkeypatch.undo()
        get_settings.cache_clear()
    files = [httpx.get(address, trust_env=False).content for address in answer["images"]]
    images = [Image.open(io.BytesIO(file)) for file in files]
    assert [(image.format, image.size) for image in images] == [("PNG", (1024, 1024))] * 8
    assert all(np.array_equal(np.asarray(image), np.asarray(picture))
               for image, picture in zip(images, drawn, strict=True))


@pytest.mark.parametrize(("endpoint", "named"), [
    ("https://127.0.0.1", "is an address that is not public"), ("https://localhost", "that is not public"),
    ("https://127.0.0.1:9000", "elsewhere has to be the worker's own (SDWORKER_BUCKET_*)"),
    ("http://example.com", "without https"),
    ("https://key:hidden-key@ex\u2100mple.com", "each of them plain text"), ("https://[::1", "is not an address"),
])
def test_a_job_cannot_name_a_bucket_in_the_workers_network(endpoint, named, caplog):
    config = {"endpointUrl": endpoint, "accessId": "writer", "accessSecret": "hidden-key", "bucketName": "pictures"}
    answer = handler({"id": "a", "input": {"prompt": "a red star"}, "s3Config": config})
    assert (answer["code"], answer["field"]) == ("invalid_request", "s3Config") and named in answer["error"]
    assert "hidden-key" not in caplog.text + answer["error"]
