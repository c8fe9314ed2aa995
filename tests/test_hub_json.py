"""hub.json and .runpod/tests.json name settings that exist and requests that the worker accepts."""

import json
from pathlib import Path

import pytest

from sdworker.card import ModelCard
from sdworker.request import parse_request
from sdworker.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
HUB = json.loads((ROOT / "hub.json").read_text())
TESTS = json.loads((ROOT / ".runpod" / "tests.json").read_text())
SDXL = ModelCard("sdxl", ROOT, "StableDiffusionXLPipeline", "unet", side=1024, multiple=8, steps=30, guidance=7.0)


def test_the_endpoint_is_the_one_that_the_guide_advises():
    assert HUB["title"] and HUB["description"] and HUB["type"] == "serverless" and HUB["config"]["runsOn"] == "GPU"
    assert [HUB[name] for name in ("flashboot", "minWorkers", "maxWorkers", "idleTimeout")] == [True, 1, 3, 5]
    assert TESTS["config"]["allowedCudaVersions"] == HUB["config"]["allowedCudaVersions"]


@pytest.mark.parametrize("entry", HUB["config"]["env"], ids=lambda entry: entry["key"])
def test_each_variable_is_a_setting_with_its_default(entry):
    name = entry["key"].removeprefix(PREFIX).lower()
    field, schema = Settings.model_fields[name], Settings.model_json_schema()["properties"][name]
    assert entry["input"]["default"] == field.default and entry["input"]["name"] and entry["input"]["description"]
    assert [option["value"] for option in entry["input"].get("options", [])] == schema.get("enum", [])


@pytest.mark.parametrize("test", TESTS["tests"], ids=lambda test: test["name"])
def test_each_test_is_a_request_that_sdxl_takes(test):
    parse_request(test["input"], SDXL, Settings())
    assert test["timeout"] >= 60_000, "milliseconds; a cold start is among them"


def test_the_tests_set_settings_that_exist():
    for entry in TESTS["config"]["env"]:
        Settings(**{entry["key"].removeprefix(PREFIX).lower(): entry["value"]})
