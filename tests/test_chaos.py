"""Workers are killed, the queue goes away, weights are damaged: each job is answered, or refused clearly."""

import os
import random
import shutil
from itertools import cycle
from pathlib import Path

import pytest
from handled import HANDLER

from sdworker.core.model_info import EMBEDDED
from sdworker.embedded.shapes import judge
from sdworker.lab.queue_server import run_workers
from sdworker.lab.soak import PROMPTS
from sdworker.serve.image_io import from_data_uri

UNET = Path("unet", "diffusion_pytorch_model.safetensors")


class Weights:
    "A copy of the embedded model, whose file of weights is cut after some answers, and replaced after others."

    def __init__(self, folder: Path, cut: int, restored: int):
        shutil.copytree(EMBEDDED, folder)
        self.file, self.spare, self.answers = folder / UNET, folder.parent / "spare", 0
        shutil.copy(self.file, self.spare)
        self.at = {cut: self.cut, restored: self.restore}  # by the number of answers

    def on_answer(self, name: str) -> None:
        self.answers += 1
        self.at.get(self.answers, lambda: None)()

    def cut(self) -> None:  # beside and renamed: a worker that has the file in memory must not lose it
        half = self.spare.with_suffix(".half")
        half.write_bytes(self.spare.read_bytes()[:20_000])
        os.replace(half, self.file)

    def restore(self) -> None:
        os.replace(self.spare, self.file)


@pytest.mark.timeout(600)
def test_two_hundred_jobs_outlive_ten_killed_workers_a_lost_queue_and_damaged_weights(tmp_path):
    chance, seconds = random.Random(11), 70
    weights = Weights(tmp_path / "model", cut=20, restored=110)  # kills come in between, also on a slow machine
    jobs = [{"id": f"job-{k}", "input": {"prompt": prompt, "seed": k, "num_inference_steps": 25}}
            for k, prompt in zip(range(200), cycle(PROMPTS))]
    worker_run = run_workers(
        HANDLER, jobs, {"SDWORKER_MODEL": str(tmp_path / "model"), "SDWORKER_CONCURRENCY": "4",
                        "SDWORKER_LOG_EVERY": "0", "OMP_NUM_THREADS": "1"}, limit=550, workers=2, lease=4.0,
        arrivals=sorted(chance.uniform(0, seconds) for _ in jobs), kill=[chance.uniform(2, seconds) for _ in range(10)],
        away=(30.0, 35.0), on_answer=weights.on_answer)
    assert len(worker_run.kills) == 10 and not weights.spare.exists(), "all of it happened"
    assert set(worker_run.answers) == {job["id"] for job in jobs}, worker_run.log[-3000:]
    refused = {name: answer for name, answer in worker_run.answers.items() if "error" in answer}
    print(f"{len(refused)} refused; {sum(count - 1 for count in worker_run.deliveries.values())} given out again; "
          f"{sum(count - 1 for count in worker_run.answer_count.values())} answered twice")
    assert refused, "a worker met the damaged file"
    for name, answer in refused.items():
        assert answer["output"]["code"] == "model_error" and "fetch the model again" in answer["error"], (name, answer)
    for job in jobs:
        if job["id"] not in refused:
            [image] = worker_run.answers[job["id"]]["output"]["images"]
            assert all(judge(from_data_uri(image), job["input"]["prompt"]).values()), job
