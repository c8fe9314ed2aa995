"""The embedded model draws what the prompts say: the complete gate, on the committed weights."""

import json
from pathlib import Path

import pytest

from sdworker.core.model_info import EMBEDDED
from sdworker.lab.quality import MAX_SECONDS, MIN_RATES, gate
from sdworker.start.load import initialize_model

RECORD = json.loads((Path(__file__).parent.parent / "results" / "adherence.json").read_text())


@pytest.fixture(scope="module")
def figures():
    return gate(initialize_model())


@pytest.mark.slow
def test_adherence_gate(figures):
    rates = figures["adherence"]
    assert all(rates[name] >= rate for name, rate in MIN_RATES.items()), rates


@pytest.mark.slow
def test_record_is_of_these_weights(figures):
    assert figures["weights"] == RECORD["weights"] and figures["pairs"] == RECORD["pairs"] == 200
    assert all(abs(figures["adherence"][name] - RECORD["adherence"][name]) <= 0.01 for name in MIN_RATES)


def test_an_image_took_at_most_half_a_second_on_two_cores():
    assert RECORD["machine"]["cores"] == 2 and RECORD["steps"] <= 20
    assert RECORD["seconds_per_image_alone"]["median"] <= MAX_SECONDS


def test_weights_are_small_safetensors_in_half_precision():
    from safetensors import safe_open

    files = list(EMBEDDED.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 10e6
    for path in files:
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}
    assert not [path for path in EMBEDDED.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
