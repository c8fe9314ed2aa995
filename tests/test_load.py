"""Hundreds of jobs of all kinds for several workers at one queue: all are answered, exactly once."""

import pytest
from handled import HANDLER

from sdworker.lab.queue_server import run_workers
from sdworker.lab.soak import memory_growth, mistakes, mixed_jobs

ENVIRONMENT = {"SDWORKER_LOG_EVERY": "0", "OMP_NUM_THREADS": "1"}  # else the workers take the cores from each other


@pytest.mark.timeout(900)
def test_two_workers_answer_five_hundred_jobs_once_each():
    mixed = mixed_jobs(500)
    worker_run = run_workers(HANDLER, mixed.jobs, ENVIRONMENT | {"SDWORKER_CONCURRENCY": "8"}, limit=800, workers=2,
                             cancel=dict.fromkeys(mixed.cancelled, 0.3))
    print("memory:", {name: round(memory_growth(samples), 3) for name, samples in worker_run.memory.items()})
    assert mistakes(worker_run, mixed) == [] and set(worker_run.deliveries.values()) == {1}
    assert any(name not in worker_run.answers for name in mixed.cancelled), "some were cancelled in time"
    assert set(worker_run.workers.values()) == {"worker", "worker-2"}
    assert "Traceback" not in worker_run.log, worker_run.log[-3000:]


def test_every_kind_of_job_in_a_few():
    mixed = mixed_jobs(20)
    worker_run = run_workers(HANDLER, mixed.jobs, ENVIRONMENT | {"SDWORKER_CONCURRENCY": "6"}, 300, workers=2)
    assert mistakes(worker_run, mixed) == [] and set(worker_run.deliveries.values()) == {1}
