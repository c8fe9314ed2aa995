"""`sdworker serve` as a process, over real HTTP on the SDK's own local API."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from sdworker.embedded.shapes import judge
from sdworker.lab.demo import free_port, serving
from sdworker.serve.image_io import from_data_uri

PROMPT = "a large red star on a blue background"


@pytest.fixture(scope="module")
def client():
    with serving() as url, httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        yield client


def ask(client: httpx.Client, **fields) -> dict:
    answer = client.post("/runsync", json={"input": fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_runsync_draws(client):
    answer = ask(client, prompt=PROMPT, seed=7)
    output = answer["output"]
    assert answer["status"] == "COMPLETED"
    assert set(output) == {"images", "seed", "seeds", "timings", "warnings", "model", "usage"}
    assert all(judge(from_data_uri(output["images"][0]), PROMPT).values())
    assert output["seeds"] == [7] and output["timings"]["total"] > output["timings"]["denoise"] > 0


def test_run_and_status(client):
    job = client.post("/run", json={"input": {"prompt": PROMPT, "num_images": 2, "seed": 1}}).json()["id"]
    output = client.post(f"/status/{job}").json()["output"]
    assert output["seeds"] == [1, 2] and len(output["images"]) == 2


def test_each_image_can_be_drawn_again_alone(client):
    both = ask(client, prompt=[PROMPT, "a small black cross on yellow"], num_images=2, seed=50)["output"]
    alone = ask(client, prompt="a small black cross on yellow", seed=both["seeds"][3])["output"]
    pictures = [list(from_data_uri(text).tobytes()) for text in (both["images"][3], alone["images"][0])]
    assert max(abs(a - b) for a, b in zip(*pictures, strict=True)) <= 2


@pytest.mark.parametrize(("fields", "named"), [
    ({}, "prompt is missing"), ({"prompt": ""}, "prompt should not be empty"), ({"prompt": 3}, "prompt should be text"),
    ({"prompt": "x", "width": 65}, "width is 65: should be a multiple of 8"),
    ({"prompt": "x", "height": 10**9}, "height is 1000000000: should be from 8 to 1536"),
    ({"prompt": "x", "num_images": 99}, "num_images is 99"),
    ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps is 0"),
    ({"prompt": "x", "seed": "7"}, "seed is '7'"), ({"prompt": "x", "shceduler": "DDIM"}, "shceduler is not known"),
])
def test_bad_input_is_named_and_the_worker_lives(client, fields, named):
    answer = ask(client, **fields)
    assert answer["status"] == "FAILED" and answer["error"].startswith(named)
    assert ask(client, prompt=PROMPT, seed=7, num_inference_steps=2)["status"] == "COMPLETED"


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "sdworker.cli.main", *arguments], env={**os.environ, **environment},
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(("environment", "message"), [
    ({"SDWORKER_DEVICE": "tpu"}, "should be 'auto', 'cpu' or 'cuda'"),
    ({"SDWORKER_MAX_STEPS": "many"}, "SDWORKER_MAX_STEPS is 'many'"),
    ({"SDWORKER_MODEL": "/no/such/folder"}, "there is no such folder"),
])
def test_a_wrong_setting_ends_the_start_with_one_sentence(environment, message):
    done = cli("serve", "--port", str(free_port()), **environment)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr + done.stdout


HANDLER = Path(__file__).parent.parent / ".runpod" / "handler.py"


def test_start_without_a_queue_says_so():
    done = cli("start")
    assert done.returncode == 1 and "RUNPOD_WEBHOOK_GET_JOB is not set" in done.stderr


def test_handler_file_answers_a_test_input():
    command = [sys.executable, HANDLER, "--test_input", json.dumps({"input": {"prompt": PROMPT, "seed": 7}})]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "completed successfully" in done.stdout


def test_handler_file_names_a_wrong_setting():
    wrong = {"SDWORKER_DTYPE": "float8", "RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/job-take/x?"}
    done = subprocess.run([sys.executable, HANDLER], env=os.environ | wrong, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("sdworker: SDWORKER_DTYPE is 'float8'")


@pytest.mark.parametrize(("arguments", "message"), [
    (["generate", "x", "--width", "100"], "width is 100: should be a multiple of 8"),
    (["generate", ""], "prompt should not be empty"),
    (["generate", "x", "-n", "many"], "Input should be a valid integer"),
    (["serve", "--port", "99999"], "less than or equal to 65535"),
    (["coldstart", "--plot", "start.jpg"], "start.jpg should be a .png or .svg file"),
    (["plan", "--plot", "nowhere/front.png"], "front.png should be a .png or .svg file in a folder that exists"),
    (["coldstart", "--repeat", "0"], "greater than or equal to 1"),
    (["coldstart", "--against", "us"], "'us' is not one of 'naive'"),
])
def test_wrong_arguments_are_named(arguments, message):
    done = cli(*arguments, COLUMNS="200")
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["coldstart", "plan"])
def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(command, tmp_path):
    code = ("import importlib.util as util, sys; find = util.find_spec\n"
            "util.find_spec = lambda name: None if name == 'matplotlib' else find(name)\n"
            "from sdworker.cli.main import app; "
            f"app(['{command}', '--plot', {str(tmp_path / 'start.svg')!r}])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "sdworker[notebooks]" in done.stderr


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "out").write_text("a file")
    done = cli("generate", "x", "-o", str(tmp_path / "out"))
    assert done.returncode == 1 and "File exists" in done.stderr and "Traceback" not in done.stderr


def test_generate_writes_pictures_and_json(tmp_path):
    done = cli("generate", PROMPT, "-n", "2", "--seed", "7", "-o", str(tmp_path / "a folder"), "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and [image["seed"] for image in report["images"]] == [7, 8]
    assert len(list((tmp_path / "a folder").glob("*.png"))) == 2


def test_the_limits_of_a_queue_are_not_those_of_the_command(tmp_path):
    tight = {"SDWORKER_MAX_STEPS": "1", "SDWORKER_MAX_SIZE_PX": "64", "SDWORKER_MAX_PROMPT_CHARS": "5"}
    size = ("--width", "96", "--height", "64", "--steps", "2")
    done = cli("generate", "a (red:1.3) star", *size, "--prompt-syntax", "weighted", "--clip-skip", "1",
               "-o", str(tmp_path), "--json", **tight)
    assert done.returncode == 0, done.stderr
    assert not any("weights" in warning for warning in json.loads(done.stdout)["warnings"])


@pytest.mark.parametrize("command", ["bench", "coldstart"])
def test_where_there_is_no_lab_a_command_says_so(command):
    """As in the image, whose test looks for the same words."""
    code = "import sys; sys.modules['sdworker.lab'] = None; from sdworker.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("sdworker: the image does not contain"), done.stderr
    assert done.stderr.count("\n") == 1
