"""Each switch keeps to what it promises of its pictures, does something, and is found out when it is broken."""

import json
import os
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from sdworker.aot.selection import unsupported_by_aot
from sdworker.core.model_info import EMBEDDED, ModelError, read_model_info
from sdworker.core.timing import machine
from sdworker.embedded.shapes import pairs
from sdworker.engine.build_pipeline import defaults
from sdworker.engine.generate import generate
from sdworker.engine.torch_compile import fill_cache, is_compiled
from sdworker.lab.bench import supervise
from sdworker.lab.quality import LOSSLESS, SWITCHES, Switch, compare_to_baseline, draw_pairs, engine_with

AOT_DIR = Path(__file__).parent.parent / "out" / "aot"
MODEL = read_model_info(EMBEDDED, "embedded")
PROMPT_SEEDS = pairs("gate 2", 20)


@pytest.fixture(autouse=True)
def aot_dir():
    with patch("sdworker.lab.quality.get_settings", return_value=defaults(aot_dir=str(AOT_DIR))):
        yield


@lru_cache(maxsize=1)
def plain():
    return engine_with(Switch(), MODEL)


@lru_cache(maxsize=1)
def plainly():
    return list(draw_pairs(plain(), PROMPT_SEEDS, 10))


def verdict(engine, switch, n=20):
    drawn = list(draw_pairs(engine, PROMPT_SEEDS[:n], 10, **switch.request))
    return compare_to_baseline(drawn, plainly()[:n], switch.min_psnr)


@pytest.fixture(scope="module", autouse=True)
def compiler_cache(tmp_path_factory):
    """What is compiled here goes, and is found, in a folder of its own."""
    with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path_factory.mktemp("compiled"))):
        yield


def built(name):
    """The engine of a switch; one that this machine cannot have is skipped with the reason."""
    if name == "compile: cached":
        fill_cache(engine_with(SWITCHES["compile: regional"], MODEL))
    try:
        return engine_with(SWITCHES[name], MODEL)
    except ModelError as error:
        expected = ("not used", "no AOT package has been made")
        if not any(words in str(error) for words in expected):  # something is broken
            raise
        pytest.skip(str(error))


def state(engine):
    """What a switch may have changed of an engine."""
    if not hasattr(engine, "pipe"):
        return type(engine).__name__
    pipe = engine.pipe
    attention = {(type(one).__name__, str(getattr(one, "backend", ""))) for one in pipe.unet.attn_processors.values()}
    return (attention, pipe.vae.use_slicing, pipe.vae.use_tiling, pipe.unet.dtype, hasattr(pipe.unet, "_hf_hook"),
            pipe.unet.conv_in.weight.stride(), type(pipe.unet.forward).__name__, pipe.unet.mid_block.forward.__name__,
            type(pipe.unet.time_embedding.linear_1.weight).__name__, is_compiled(pipe.unet))


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_keeps_to_what_it_promises(name):
    result = verdict(built(name), SWITCHES[name], 5 if name == "bfloat16" else 20)  # processors without it take minutes
    assert result.passed, result


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * name.startswith(("compile", "aot"))) for name in SWITCHES])
def test_a_switch_does_something(name):
    engine, switch = built(name), SWITCHES[name]
    if switch.settings:
        assert state(engine) != state(plain())
        settings = defaults(**switch.settings)
        assert unsupported_by_aot(settings, MODEL) or settings.engine == "aot" or settings.dtype != "auto" or (
            settings.quantize != "off")
    else:
        pictures = [generate(plain(), PROMPT_SEEDS[0][0], seed=1, **more).pictures[0].image
                    for more in ({}, switch.request)]
        assert pictures[0].tobytes() != pictures[1].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.9])
def test_the_gate_finds_attention_that_is_a_tenth_too_weak(share):
    """Another kernel stands in for xformers', which needs a GPU."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    kernels, name = _AttentionBackendRegistry._backends, "attention: xformers"
    plain_kernel = kernels[AttentionBackendName._NATIVE_MATH]
    with patch("sdworker.engine.attention._missing", return_value=""), \
            patch.dict(kernels, {AttentionBackendName.XFORMERS: plain_kernel}):
        engine = built(name)
    with patch.dict(kernels, {AttentionBackendName.XFORMERS: lambda **arguments: share * plain_kernel(**arguments)}):
        assert verdict(engine, SWITCHES[name]).passed == (share == 1)


@pytest.mark.slow
def test_the_gate_finds_slices_that_leave_one_out():
    from diffusers.models.attention_processor import SlicedAttnProcessor

    engine, original_call = built("attention: sliced"), SlicedAttnProcessor.__call__

    def one_short(self, attn, hidden_states, *arguments, **more):
        made = original_call(self, attn, hidden_states, *arguments, **more).clone()
        made[:, -1] = 0
        return made
    with patch.object(SlicedAttnProcessor, "__call__", one_short):
        assert not verdict(engine, SWITCHES["attention: sliced"]).passed


@pytest.mark.slow
def test_the_gate_finds_tiles_without_their_seams_blended():
    engine = built("VAE tiled")
    with patch.object(engine.pipe.vae, "tile_overlap_factor", 0.0), \
            patch.object(engine.pipe.vae, "tile_latent_min_size", 4), \
            patch.object(engine.pipe.vae, "tile_sample_min_size", 16):
        assert not verdict(engine, SWITCHES["VAE tiled"]).passed


@pytest.mark.slow
def test_the_gate_finds_a_number_format_that_is_too_coarse():
    engine = built("bfloat16")
    for parameter in engine.pipe.unet.parameters():
        scale = parameter.abs().max() / 7
        parameter.data = (parameter / scale).round() * scale  # four bits
    # four pictures are enough to see it; bfloat16 is slow on a processor without instructions for it
    assert not verdict(engine, SWITCHES["bfloat16"], 4).passed


@pytest.mark.slow
def test_the_gate_finds_another_number_in_a_table():
    engine = built("aot")
    engine.tables["own rows"] = engine.tables["own rows"] * 1.02
    assert not verdict(engine, SWITCHES["aot"]).passed


@pytest.mark.slow
@pytest.mark.parametrize("name, broken", [
    ("DPM++ 2M, 12 steps", {"steps": 2}), ("guidance to 60 %", {"guidance_stop": 0})])
def test_the_gate_finds_a_request_that_saves_too_much(name, broken):
    switch = SWITCHES[name]
    result = compare_to_baseline(list(draw_pairs(plain(), PROMPT_SEEDS, 10, **switch.request | broken)), plainly(),
                                switch.min_psnr)
    assert not result.passed, result


@pytest.mark.slow
@pytest.mark.timeout(1300)  # on a busy machine; three minutes on a quiet one
def test_the_suite_for_a_gpu_runs_in_small(tmp_path):
    command = [sys.executable, "-m", "sdworker.cli.main", "bench", "--suite", "gpu", "--device", "cpu", "--tiny",
               "--minutes", "20", "--to", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert json.loads((tmp_path / "bench-gpu-tiny.json").read_text()) == record
    rows = record["rows"]
    assert {"roofline", "memory", "batch", "transformer"} < set(rows)
    assert rows["roofline"]["operations"] > 1e9
    measured = {name for name, row in rows.items() if name.startswith("switch ") and "time" in row}
    assert len(measured) >= 9
    assert all(rows[name]["psnr"] >= LOSSLESS for name in measured if rows[name]["least"] == LOSSLESS)
    assert not [name for name, row in rows.items() if "failed" in row or "out_of_memory" in row]
    assert "time" in rows["switch compile: cached"] or "time" not in rows["switch compile: regional"]
    if not torch.cuda.is_available():
        assert "no CUDA device" in rows["switch attention: xformers"]["not_used"]


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    part = tmp_path / ".bench-gpu-tiny.part.json"
    part.write_text(json.dumps({"machine": machine(), "done": {"roofline": {"share": 0.5}}}))
    command = [sys.executable, "-m", "sdworker.cli.main", "bench", "--suite", "gpu", "--device", "cpu", "--tiny",
               "--to", str(tmp_path), "--minutes", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3 and "call again to go on" in done.stderr
    assert "not measured yet: switch offload: sequential: takes about" in done.stderr
    assert json.loads(part.read_text())["done"] == {"roofline": {"share": 0.5}}
    assert not (tmp_path / "bench-gpu-tiny.json").exists()


def test_a_row_that_hangs_is_ended_and_the_others_are_measured(tmp_path):
    script = """
import json, sys, time
from pathlib import Path
from sdworker.lab.bench import run

rows = run({"hangs": lambda: time.sleep(600), "other": lambda: 1}, Path(sys.argv[1]), seconds={"hangs": 1})
if rows is None:
    sys.exit(3)
Path(sys.argv[2]).write_text(json.dumps(rows))
"""
    part, record, begun = tmp_path / "part.json", tmp_path / "rows.json", []

    def begin(minutes):
        begun.append(minutes)
        return subprocess.Popen([sys.executable, "-c", script, str(part), str(record)], stderr=subprocess.DEVNULL)
    assert supervise(begin, part, 10) and len(begun) == 3
    assert json.loads(record.read_text()) == {
        "hangs": {"failed": "the process that measured it ended; it is ended after 3 s", "tries": 2}, "other": 1}


def test_a_row_that_the_end_of_its_call_cuts_off_is_run_again(tmp_path):
    script = """
import faulthandler, json, os, sys, time
from pathlib import Path
from sdworker.lab.bench import run

call, minutes, later, part, record = json.loads(sys.argv[1])
now = time.time
time.time = lambda: now() + later
if call < 3:
    faulthandler.dump_traceback_later = lambda *_, **more: os._exit(1)  # as if the limit were reached at once
rows = run({f"first of call {call}": lambda: 1, "slow": lambda: 2}, Path(part), minutes, seconds={"slow": 600})
if rows is None:
    sys.exit(3)
Path(record).write_text(json.dumps(rows))
"""
    part, record = tmp_path / "part.json", tmp_path / "rows.json"
    for call in (1, 2, 3):  # of 20 minutes, less than three times what the slow row takes
        begun = []

        def begin(minutes, call=call, begun=begun):
            begun.append(minutes)  # the second process begins after the call's end
            arguments = [call, *((20, 0) if len(begun) == 1 else (-1, 1500)), str(part), str(record)]
            return subprocess.Popen([sys.executable, "-c", script, json.dumps(arguments)])
        assert supervise(begin, part, 20) == (call == 3)
        assert call == 3 or (len(begun) == 2 and json.loads(part.read_text())["failed"] == {})
    assert json.loads(record.read_text()) == {"first of call 3": 1, "slow": 2}


def test_a_row_that_is_interrupted_is_run_again(tmp_path):
    script = """
import json, sys, time
from pathlib import Path
from sdworker.lab.bench import run

rows = run({"row": lambda: time.sleep(float(sys.argv[1]))}, Path(sys.argv[2]))
Path(sys.argv[3]).write_text(json.dumps(rows))
"""
    part, record = tmp_path / "part.json", tmp_path / "rows.json"

    def begin(seconds, minutes):
        return subprocess.Popen([sys.executable, "-c", script, str(seconds), str(part), str(record)])

    def interrupt(*_):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        supervise(partial(begin, 600), part, 10, interrupt)
    assert json.loads(part.read_text()).keys() == {"machine", "done", "failed", "missing"}, "no row is under way"
    assert supervise(partial(begin, 0), part, 10) and json.loads(record.read_text()) == {"row": None}


def test_an_interrupt_does_not_excuse_a_row_that_ended_its_process_before(tmp_path):
    part = tmp_path / "part.json"
    part.write_text(json.dumps({"done": {}, "doing": {"row": "crashes", "of": 1}}))
    before = part.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        supervise(lambda minutes: subprocess.Popen(["sleep", "600"]), part, 10, interrupt)
    assert part.read_bytes() == before
