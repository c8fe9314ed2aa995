"""A safety checker through bake and worker: it flags pictures, changes none, and is absent unless it is switched on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from handled import handled, pixels
from PIL import Image

from sdworker.build.manifest import check_files_fast, read_manifest, verify
from sdworker.core.model_info import EMBEDDED, ModelError, read_model_info
from sdworker.embedded.tiny_models import add_safety_checker, miniature
from sdworker.engine.generate import generate
from sdworker.engine.pipeline import FamilyEngine
from sdworker.engine.safety_checker import SafetyChecker
from sdworker.lab.hub_server import Hub
from sdworker.serve.handler import handler
from sdworker.start.load import initialize_model

STAR, CROSS = "a large red star on a blue background", "a small green cross on a white background"
TWO = {"prompt": [STAR, CROSS], "seed": 7}
ON = {"SDWORKER_SAFETY_CHECKER": "1"}
NETWORK = "diffusers.pipelines.stable_diffusion.safety_checker"
SAY_IMPORTED = ("import atexit, sys\n"
                f"atexit.register(lambda: print('network:', '{NETWORK}' in sys.modules, file=sys.stderr))\n")
RED = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The embedded model with a checker that flags its picture of the star."""
    folder = shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("checked") / "model")
    star = generate(FamilyEngine(read_model_info(EMBEDDED)), STAR, seed=7).pictures[0].image
    return add_safety_checker(folder, star)


def test_each_picture_has_a_flag_and_stays_as_it_is(model):
    jobs = {"two": TWO, "one": {"prompt": CROSS}, "sdxl": {"prompt": STAR, "high_noise_frac": 0.8},
            "openai": TWO | {"response_format": "b64_json"}}
    plain, off_log = handled(model, {"two": TWO}, SAY_IMPORTED)
    answers, log = handled(model, jobs, SAY_IMPORTED, **ON)
    assert [answers[name]["flagged"] for name in jobs] == [[True, False], [False], [True], [True, False]]
    assert [set(entry) for entry in answers["openai"]["data"]] == [{"b64_json"}] * 2
    assert answers["two"]["images"] == plain["two"]["images"] and answers["two"]["seeds"] == [7, 8]
    assert answers["two"]["timings"]["safety_checker"] > 0 and answers["two"]["warnings"] == []
    assert "flagged" not in plain["two"] and "safety_checker" not in plain["two"]["timings"]
    assert "network: False" in off_log and "network: True" in log, "nothing of it is imported while it is off"
    assert "black image" not in log and "Loading weights" not in log and "stubs" not in log


def test_a_model_that_brings_its_checker_is_not_blackened(tmp_path):
    folder = add_safety_checker(miniature("StableDiffusionPipeline", tmp_path / "model"), RED, threshold=-1)
    index = folder / "model_index.json"
    own = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index.write_text(json.dumps(json.loads(index.read_text()) | own))
    answers, log = handled(folder, {"one": {}}, **ON)
    assert answers["one"]["flagged"] == [True], "this checker flags every picture"
    assert pixels(answers["one"])[0].any() and "black image" not in log


def test_a_missing_checker_ends_the_start_with_a_sentence_and_its_remedy():
    done = subprocess.run([sys.executable, "-m", "sdworker.cli.main", "serve", "--port", "1"], env=os.environ | ON,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("sdworker: SDWORKER_SAFETY_CHECKER is on, and there are no safetensors in ")
    assert "`sdworker bake embedded --to DIR --addons safety_checker=" in done.stderr and done.stderr.count("\n") == 1


def test_a_checker_that_fails_fails_the_job_and_not_the_worker(model):
    def broken(image):
        raise KeyError("ours")
    with patch.object(initialize_model(), "safety_checker", broken, create=True):
        answer = handler({"id": "one", "input": {"prompt": STAR, "num_inference_steps": 1}})
    assert answer["code"] == "internal_error" and "KeyError" in answer["error"]
    assert "images" in handler({"id": "two", "input": {"prompt": STAR, "num_inference_steps": 1}})


def test_a_checker_in_half_precision_flags_the_same(model):
    star, cross = (picture.image for picture in generate(FamilyEngine(read_model_info(EMBEDDED)), **TWO).pictures)
    checker = SafetyChecker(read_model_info(model), dtype="float16")
    assert [checker(star), checker(cross)] == [True, False] and checker.network.dtype == torch.float16


def bake(hub: Hub, to: Path, *more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(to.parent / "hub")}
    return subprocess.run([sys.executable, "-m", "sdworker.cli.main", "bake", "owner/model", "--to", to, *more],
                          env=environment, capture_output=True, text=True)


def checker_files(folder: Path) -> dict[str, str]:
    """The files of a baked checker, and the repositories that they came from."""
    assert verify(folder)
    return {entry["file"]: entry["repository"] for entry in read_manifest(folder)["files"] if "safety" in entry["file"]}


def test_a_bake_takes_a_checker_only_if_it_is_named(model, tmp_path):
    alone = add_safety_checker(tmp_path / "alone", RED) / "safety_checker"
    (pickled := tmp_path / "pickled").mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").touch()
    with Hub({"owner/model": model, "owner/checker": alone, "owner/pickled": pickled}) as hub:
        without, own, other, never = (tmp_path / name for name in ("without", "own", "other", "never"))
        for to, addons in ((without, ""), (own, "safety_checker"),
                           (other, f"safety_checker=owner/checker@{hub.commit('owner/checker')}")):
            assert (done := bake(hub, to, "--addons", addons)).returncode == 0, done.stderr
        refused = bake(hub, never, "--addons", f"safety_checker=owner/pickled@{hub.commit('owner/pickled')}")
        assert refused.returncode == 1 and "safety_checker has no safetensors at this revision" in refused.stderr
    names = ("safety_checker/config.json", "safety_checker/model.safetensors")
    assert checker_files(without) == {} and not (without / "safety_checker").exists()
    assert checker_files(own) == dict.fromkeys(names, "owner/model")
    assert checker_files(other) == dict.fromkeys(names, "owner/checker")
    answers, _ = handled(own, {"two": TWO}, **ON)
    assert answers["two"]["flagged"] == [True, False]
    os.truncate(own / names[1], 1000)
    with pytest.raises(ModelError, match=r"safety_checker/model\.safetensors has 1000 of"):
        check_files_fast(own)


def test_a_folder_is_baked_with_its_checker_too(model, tmp_path):
    done = subprocess.run([sys.executable, "-m", "sdworker.cli.main", "bake", model, "--to", tmp_path / "baked",
                           "--addons", "safety_checker"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "baked" / "safety_checker" / "model.safetensors").exists() and verify(tmp_path / "baked")


def test_generate_names_a_flagged_picture(model, tmp_path):
    done = subprocess.run([sys.executable, "-m", "sdworker.cli.main", "generate", STAR, "--seed", "7", "-o", tmp_path],
                          env=os.environ | ON | {"SDWORKER_MODEL": str(model)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("s  flagged by the safety checker"), done.stderr
