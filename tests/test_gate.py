"""The embedded model draws what it is told: the whole gate, on the committed weights."""

import json
from pathlib import Path

from sdworker.card import EMBEDDED
from sdworker.load import initialize_model
from sdworker.quality import LEAST, gate

RECORD = Path(__file__).parent.parent / "results" / "adherence.json"


def test_adherence_gate():
    figures, record = gate(initialize_model()), json.loads(RECORD.read_text())
    rates = figures["adherence"]
    assert figures["pairs"] == 200 and figures["steps"] <= 20
    assert all(rates[name] >= least for name, least in LEAST.items()), rates
    assert figures["weights"] == record["weights"], "results/adherence.json is of other weights"


def test_record_is_a_pass_on_two_cores():
    record = json.loads(RECORD.read_text())
    assert record["passed"] and record["pairs"] == 200
    assert record["machine"]["cores"] == 2 and record["seconds_per_image_alone"]["median"] <= 0.5


def test_weights_are_small_safetensors_in_half_precision():
    from safetensors import safe_open

    files = list(EMBEDDED.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 10e6
    for path in files:
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}
    assert not [path for path in EMBEDDED.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
