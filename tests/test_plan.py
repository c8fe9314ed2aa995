"""The simulated endpoint against theory, its own rules, and a real trace."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdworker.plan import Endpoint, broken_rule, erlang_wait, poisson, read_trace, simulate
from sdworker.replay import replay

TRACE = Path(os.environ.get("SDWORKER_DATA", ""), "gentd26-sd-requests-2024-11.csv.gz")


@pytest.mark.parametrize(("workers", "seconds"), [(1, 0.5), (2, 1.2), (4, 2.8), (8, 6.0)])
def test_the_mean_wait_is_erlangs_within_two_percent(workers, seconds):
    waits = [simulate(Endpoint(workers, workers, turn=0), poisson(86400, seconds, days=5, seed=seed)).wait.mean()
             for seed in range(4)]
    assert abs(sum(waits) / 4 / erlang_wait(workers, 1, seconds) - 1) < 0.02


def test_a_day_of_a_hundred_thousand_requests_keeps_every_rule():
    outcome = simulate(Endpoint(0, 20, idle=5), poisson(100_000, 5, swing=0.8, burst=3))
    assert len(outcome.start) > 90_000 and not broken_rule(outcome)


@pytest.mark.skipif(not TRACE.is_file(), reason="the trace is in no folder that SDWORKER_DATA names")
def test_the_trace_gets_a_recommendation_that_is_cheaper_than_the_guide():
    command = [sys.executable, "-m", "sdworker.cli", "plan", "--trace", str(TRACE), "--grid", "default",
               "--goal", "p95<30s", "--json"]
    begun = time.perf_counter()
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{time.perf_counter() - begun:.0f} s")
    assert found["recommendation"]["wait_p95"] < 30 and found["ratio"] < 0.6 and len(found["grid"]) == 60
    record = json.loads((Path(__file__).parent.parent / "results" / "plan-trace.json").read_text())
    for name, value in record["recommendation"].items():
        assert found["recommendation"][name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
    assert not broken_rule(simulate(Endpoint(), read_trace(TRACE)))


@pytest.mark.timeout(600)
def test_two_real_workers_take_as_long_as_the_simulated_ones():
    found = replay(100)  # results/plan-replay.json holds 200
    assert abs(found["ratio"] - 1) < 0.15, {name: found[name] for name in ("real", "simulated")}
