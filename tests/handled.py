"""Jobs through a worker's handler in a process of its own, without the SDK's pauses between them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from sdworker.engine.types import ImageSpec, Picture, SamplingParams
from sdworker.serve.image_io import from_data_uri

PROMPT = "a large red star on a blue background"
HANDLER = [sys.executable, str(Path(__file__).parent.parent / ".runpod" / "handler.py")]  # what RunPod starts
WORKER = """
import json, logging, sys
from sdworker.serve.handler import handler
logging.basicConfig(level="INFO", format="%(message)s")
jobs = json.load(sys.stdin)
json.dump({name: handler({"id": name, "input": payload}) for name, payload in jobs.items()}, sys.stdout)
heavy = ("torchao", "peft", "diffusers", "xformers", "torch._dynamo")
print("imported:", *(name for name in heavy if name in sys.modules), file=sys.stderr)
"""


def job(name: str, **fields: Any) -> dict[str, Any]:
    "A job for a worker at a queue."
    return {"id": name, "input": {"prompt": PROMPT, "seed": 7} | fields}


def pixels(answer: dict) -> list[np.ndarray]:
    assert "images" in answer, answer
    return [np.asarray(from_data_uri(image), int) for image in answer["images"]]


def drawn_by(picture_of: Callable[[ImageSpec, SamplingParams], Image.Image]) -> AbstractContextManager:
    "Let a function make each picture in this process, in place of the engine's drawing."
    def draw_batch(engine, shares):
        for drawing, count in shares.items():
            for spec in drawing.specs[len(drawing.pictures):][:count]:
                picture = Picture(picture_of(spec, drawing.params), spec.prompt, spec.seed, 0.0)
                drawing.pictures.append(picture)
                drawing.on_picture(picture)
    return patch("sdworker.engine.generate._draw_batch", draw_batch)


def handled(model: Path | str, jobs: dict[str, dict], before: str = "", **environment: str) -> tuple[dict, str]:
    "Answers of a worker's handler in a process of its own, by the jobs' names, and its log; before: code to run first."
    payloads = {name: {"prompt": "a red star", "seed": 7} | payload for name, payload in jobs.items()}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", before + WORKER], input=json.dumps(payloads),
                          text=True, capture_output=True,
                          env=os.environ | {"SDWORKER_MODEL": str(model)} | environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout), done.stderr
