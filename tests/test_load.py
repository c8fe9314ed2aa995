"""Hundreds of jobs of all kinds for several workers at one queue: all are answered, exactly once, and nothing grows."""

import random
import sys
from itertools import cycle
from pathlib import Path

import pytest

from sdworker.embedded.shapes import judge
from sdworker.lab.queue_server import run_workers
from sdworker.serve.image_io import from_data_uri

HANDLER = [sys.executable, str(Path(__file__).parent.parent / ".runpod" / "handler.py")]
ENVIRONMENT = {"SDWORKER_LOG_EVERY": "0", "OMP_NUM_THREADS": "1"}  # else the workers take the cores from each other
PROMPTS = ("a large red star on a blue background", "a small yellow ring on a purple background",
           "a large green circle on a white background")
SHAPES = ({}, {"num_inference_steps": 25}, {"num_images": 2}, {"num_images": 3, "scheduler": "euler_a"},
          {"negative_prompt": "green"}, {"guidance_scale": 2.5}, {"image_format": "webp"})
BAD = ({"width": 100}, {"num_inference_steps": 0}, {"scheduler": "none"}, {"prompt": ""}, {"bogus": 1})


def mixed_jobs(n: int) -> tuple[list[dict], list[str], list[str]]:
    "Jobs in random order, a tenth of them bad and a twentieth to be cancelled: also the names of both."
    random_order, jobs = random.Random(7), []
    shapes, bad_shapes, prompts = cycle(SHAPES), cycle(BAD), cycle(PROMPTS)
    for k in range(n):
        fields = next(bad_shapes) if k % 10 == 5 else next(shapes)
        if k % 20 == 12:
            fields = {"num_images": 8, "num_inference_steps": 100}
        jobs.append({"id": f"job-{k}", "input": {"prompt": next(prompts), "seed": k} | fields})
    random_order.shuffle(jobs)
    return jobs, [f"job-{k}" for k in range(5, n, 10)], [f"job-{k}" for k in range(12, n, 20)]


def check_answers(worker_run, jobs, bad, cancelled) -> None:
    "Every job is answered once and rightly, or was cancelled."
    for job in jobs:
        name = job["id"]
        if name in cancelled and name not in worker_run.answers:
            assert name in worker_run.cancelled_at
            continue
        assert worker_run.answer_count[name] == 1 == worker_run.deliveries[name], name
        if name in bad:
            assert worker_run.answers[name]["output"]["code"] == "invalid_request"
        else:
            images = worker_run.answers[name]["output"]["images"]
            assert len(images) == job["input"].get("num_images", 1)
            if name not in cancelled and job["input"].get("guidance_scale") is None:
                assert all(judge(from_data_uri(images[0]), job["input"]["prompt"]).values()), job


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_answer_five_hundred_jobs_once_each():
    jobs, bad, cancelled = mixed_jobs(500)
    worker_run = run_workers(HANDLER, jobs, ENVIRONMENT | {"SDWORKER_CONCURRENCY": "8"}, limit=800, workers=2,
                             cancel=dict.fromkeys(cancelled, 0.3))
    check_answers(worker_run, jobs, bad, cancelled)
    assert any(name not in worker_run.answers for name in cancelled), "some were cancelled in time"
    assert set(worker_run.workers.values()) == {"worker", "worker-2"}
    assert "Traceback" not in worker_run.log, worker_run.log[-3000:]


def test_every_kind_of_job_in_a_few():
    jobs, bad, _ = mixed_jobs(20)
    worker_run = run_workers(HANDLER, jobs, ENVIRONMENT | {"SDWORKER_CONCURRENCY": "6"}, 300, workers=2)
    check_answers(worker_run, jobs, bad, [])
