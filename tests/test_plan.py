"""The simulated endpoint against theory, its own rules, and a real trace."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sdworker.cli.main import app
from sdworker.operate.plan import Endpoint, Load, Outcome, poisson, read_trace, simulate

TRACE = Path(os.environ.get("SDWORKER_DATA", ""), "gentd26-sd-requests-2024-11.csv.gz")


def erlang_wait(workers: int, rate: float, seconds: float) -> float:
    """The mean wait in seconds in a queue with several servers, by Erlang's formula (M/M/c); requests a second."""
    offered = rate * seconds
    last = offered**workers / math.factorial(workers) / (1 - offered / workers)
    share = last / (sum(offered**k / math.factorial(k) for k in range(workers)) + last)
    return share * seconds / (workers - offered)


def violated_invariant(outcome: Outcome) -> str:
    """The first rule that an outcome breaks, of those that hold for every endpoint; empty: none."""
    own, load, workers = outcome.endpoint, outcome.load, outcome.workers
    if np.isnan(outcome.start).any() or (outcome.wait < -1e-6).any():
        return "a request was never taken up, or before it came"
    if abs(sum(one.busy for one in workers) - load.seconds.sum()) > 1e-6 * max(load.seconds.sum(), 1):
        return "work was lost or done twice"
    moments = sorted([(one.ended, -1) for one in workers] + [(one.started, 1) for one in workers])
    if max(np.cumsum([step for _, step in moments])) > own.max_workers:
        return "more workers at once than allowed"
    flex = [one for one in workers if not one.active]
    minimum = sum(one.boot + one.busy for one in flex) + own.idle * len(flex)
    return "" if sum(one.ended - one.started for one in flex) >= minimum - 1e-6 else "a worker went before its time"


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "seconds"), [(1, 0.5), (2, 1.2), (4, 2.8), (8, 6.0)])
def test_the_mean_wait_is_erlangs_within_two_percent(workers, seconds):
    endpoint = Endpoint(workers, workers)
    waits = [simulate(endpoint, poisson(86400, seconds, days=5, seed=seed)).wait.mean() for seed in range(4)]
    assert abs(sum(waits) / 4 / erlang_wait(workers, 1, seconds) - 1) < 0.02


@pytest.mark.parametrize("idle", [1, 5, 60, 300])
@pytest.mark.parametrize("an_hour", [6, 60, 600])
def test_one_worker_that_comes_and_goes_is_as_computed(an_hour, idle):
    """From one idle moment to the next: requests served, and time without a worker; random arrivals."""
    endpoint, rate, seconds = Endpoint(0, 1, idle, cold=20, spread=0), an_hour / 3600, 4.0
    load = poisson(24 * an_hour, seconds, days=10_000 / 24 / an_hour, seed=1)
    outcome = simulate(endpoint, Load(load.arrivals, np.full(len(load.arrivals), seconds), load.images))
    no_arrival = math.exp(-rate * idle)  # the share of gaps that are longer than the idle timeout
    served = (1 + rate * endpoint.cold * no_arrival) / (1 - rate * seconds)
    alive = sum(one.ended - one.started for one in outcome.workers) / len(load.arrivals)
    assert abs(outcome.cold.mean() - no_arrival / served) < 0.02
    assert abs(alive / (1 / rate - no_arrival / rate / served) - 1) < 0.03


def test_the_rules_hold_for_settings_of_all_kinds_and_can_be_broken():
    rng, loads = np.random.default_rng(1), (poisson(5000, 4, 0.2, burst=5), poisson(3000, 20, 0.2, swing=1))
    for _ in range(20):
        minimum = int(rng.integers(0, 3))
        endpoint = Endpoint(minimum, minimum + int(rng.integers(1, 4)), float(rng.choice([0, 1, 30])), 4.0,
                            [None, 1, 3][rng.integers(3)], cold=float(rng.choice([0, 5, 60])))
        for load in loads:
            assert not (broken := violated_invariant(simulate(endpoint, load))), (broken, endpoint)
    outcome = simulate(Endpoint(), loads[0])
    assert violated_invariant(replace(outcome, workers=outcome.workers[1:])) == "work was lost or done twice"
    assert violated_invariant(replace(outcome, endpoint=Endpoint(0, 1))) == "more workers at once than allowed"


def planned(*arguments: str) -> str:
    """What `sdworker plan` prints."""
    done = CliRunner().invoke(app, ["plan", "--requests", "200", "--min", "0", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_gpu_has_its_own_seconds_which_are_estimated():
    slow, quick = (json.loads(planned("--gpu", gpu, "--json")) for gpu in ("A4000", "4090"))
    assert slow["load"]["seconds"] > 1.5 * quick["load"]["seconds"], "at less than half the rate"
    for gpu in ("A4000", "4090"):
        assert "estimated, not measured; give --seconds if you have measured" in planned("--gpu", gpu)


def test_measured_seconds_go_before_the_estimate():
    measured = [json.loads(planned("--gpu", gpu, "--seconds", "5", "--json")) for gpu in ("A4000", "4090")]
    assert measured[0]["load"] == measured[1]["load"] and measured[0]["estimate"] is None
    assert "estimated" not in planned("--gpu", "A4000", "--seconds", "5")


def test_a_day_of_a_hundred_thousand_requests_keeps_every_rule():
    outcome = simulate(Endpoint(0, 20, idle=5), poisson(100_000, 5, swing=0.8, burst=3))
    assert len(outcome.start) > 90_000 and not violated_invariant(outcome)


@pytest.mark.skipif(not TRACE.is_file(), reason="the trace is in no folder that SDWORKER_DATA names")
def test_the_trace_gets_a_recommendation_that_is_cheaper_than_the_guide():
    command = [sys.executable, "-m", "sdworker.cli.main", "plan", "--trace", str(TRACE), "--grid", "default",
               "--goal", "p95<30s", "--json"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["recommendation"]["wait_p95"] < 30 and result["ratio"] < 0.6 and len(result["grid"]) == 60
    record = json.loads((Path(__file__).parent.parent / "results" / "plan-trace.json").read_text())
    for name, value in record["recommendation"].items():
        assert result["recommendation"][name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
    assert not violated_invariant(simulate(Endpoint(), read_trace(TRACE)))
