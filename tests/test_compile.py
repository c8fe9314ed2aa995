"""Compiled code draws from the first job on, and a cache for another machine is named and left alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from handled import PROMPT, job
from PIL import Image
from safetensors.torch import save_file

from sdworker.core.model_info import EMBEDDED, read_model_info
from sdworker.core.timing import psnr
from sdworker.embedded.tiny_models import miniature
from sdworker.engine.build_pipeline import build_pipeline, defaults
from sdworker.engine.diffusers_pipeline import DiffusersEngine
from sdworker.engine.generate import generate
from sdworker.engine.pipeline import FamilyEngine
from sdworker.engine.torch_compile import compile_before_jobs, is_compiled, use_compile, why_not_compiled
from sdworker.lab.queue_server import run_workers
from sdworker.serve.image_io import from_data_uri

OURS = [sys.executable, "-m", "sdworker.cli.main", "start"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache filled by the command, for the embedded model on this processor, one image in a call."""
    folder = tmp_path_factory.mktemp("cache")
    done = subprocess.run([sys.executable, "-m", "sdworker.cli.main", "bake", "--compile-cache", "--json"], text=True,
                          env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "SDWORKER_MAX_BATCH": "1"},
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compile_cache"] == str(folder)
    return folder


@pytest.mark.parametrize("other", [{}, {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}], ids=["here", "older"])
def test_a_cache_draws_on_every_processor_of_its_kind(cache, other):
    """For torch's own key a processor without AVX-512 is the same, and code for one that has it draws noise there."""
    worker_run = run_workers(OURS, [job("first")], {"SDWORKER_COMPILE": "cached", "TORCHINDUCTOR_CACHE_DIR": str(cache),
                                                    "SDWORKER_MAX_BATCH": "1"} | other, limit=400)
    log = worker_run.log
    assert "output" in worker_run.answers["first"], (worker_run.answers, log)
    first = worker_run.answers["first"]["output"]
    assert log.index("compiled in") < log.index("job first:"), log
    assert first["warnings"] == []
    plain = generate(DiffusersEngine(read_model_info(EMBEDDED)), PROMPT, seed=7).pictures[0].image
    assert psnr(from_data_uri(first["images"][0]), plain) > 40
    assert "failed" not in log and "compiled anew" not in log, log


COUNTED = """
import sdworker.serve.handler, sdworker.start.load
from sdworker.serve.batching import Batching
turn = Batching._turn

def counted(*arguments):
    import torch
    calls = []
    def count(call):
        return lambda *args, **kwargs: (calls.append(1), call(*args, **kwargs))[1]
    for module in sdworker.start.load.initialize_model().pipe.unet.modules():
        if module._compiled_call_impl:
            module._compiled_call_impl = count(module._compiled_call_impl)
    torch.compiler.set_stance("fail_on_recompile")  # nor may a call fall back on plain code
    drawn = turn(*arguments)
    print("calls of compiled code:", len(calls), flush=True)
    return drawn
Batching._turn = counted
sdworker.serve.handler.start()
"""


@pytest.mark.parametrize("load", ["background", "lazy"])
def test_the_first_job_is_drawn_by_compiled_code(load, tmp_path):
    worker_run = run_workers([sys.executable, "-c", COUNTED], [job("first")], {
        "SDWORKER_COMPILE": "regional", "SDWORKER_MAX_BATCH": "1", "SDWORKER_LOAD": load,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}, limit=400)
    log = worker_run.log
    assert "output" in worker_run.answers["first"] and worker_run.answers["first"]["output"]["warnings"] == [], log
    model, blocks = read_model_info(EMBEDDED), 6
    assert f"calls of compiled code: {blocks * model.steps}\n" in log, log
    assert log.count("compiled in") == 1
    if load == "lazy":
        assert log.index("Started.") < log.index("compiled in") < log.index("the first job waited") < log.index(
            "job first:"), "within the first job"
        assert log.count("the first job waited") == 1
    else:
        assert log.index("compiled in") < log.index("Started."), "no job is taken before"
        assert "the first job waited" not in log


@pytest.mark.parametrize("family", ["StableDiffusion3Pipeline", "ZImagePipeline"])  # names no blocks; grows
def test_blocks_are_compiled_for_any_size_and_prompt(tmp_path, family):
    engine = FamilyEngine(read_model_info(miniature(family, tmp_path / "model")))
    jobs = [{"prompt": PROMPT}, {"prompt": f"{PROMPT}, with {PROMPT}", "width": 64, "height": 48},
            {"prompt": PROMPT, "image": Image.new("RGB", (64, 48), "red")}]
    plain = [generate(engine, **job, seed=7, steps=2).pictures[0].image for job in jobs]
    assert use_compile(engine.pipe, "regional", engine.model) == ""
    assert compile_before_jobs(engine) and engine.warnings == []
    assert bool(why_not_compiled("reduce-overhead", engine.model, "cpu", "float32")) == engine.model.family.grows
    assert is_compiled(engine.pipe.transformer)
    with torch.compiler.set_stance("fail_on_recompile"):
        for picture, job in zip(plain, jobs, strict=True):
            assert psnr(picture, generate(engine, **job, seed=7, steps=2).pictures[0].image) > 50


def test_a_long_prompt_is_drawn_by_plain_code(tmp_path):
    """Blocks are compiled for one chunk of a prompt; more tokens are another length, which is not compiled anew."""
    engine = FamilyEngine(read_model_info(miniature("StableDiffusionPipeline", tmp_path / "model")))
    prompts = PROMPT, f"{PROMPT}, " * 12
    plain = [generate(engine, prompt, seed=7, steps=2).pictures[0].image for prompt in prompts]
    assert use_compile(engine.pipe, "regional", engine.model) == ""
    assert compile_before_jobs(engine) and engine.warnings == [] and is_compiled(engine.pipe.unet)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for picture, prompt in zip(plain, prompts, strict=True):
        drawn = generate(engine, prompt, seed=7, steps=2)
        assert psnr(picture, drawn.pictures[0].image) > 50 and drawn.warnings == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_other_loras_than_those_it_was_compiled_with_are_drawn_by_plain_code(tmp_path):
    shutil.copytree(EMBEDDED, folder := tmp_path / "model")
    (folder / "loras").mkdir()
    for name, block in (("one", "down_blocks.1"), ("two", "mid_block")):
        layer = f"unet.{block}.attentions.0.transformer_blocks.0.attn1.to_q"
        save_file({f"{layer}.lora_A.weight": torch.full((1, 96), 2.0), f"{layer}.lora_B.weight": torch.ones(96, 1)},
                  folder / "loras" / f"{name}.safetensors")
    plain, compiled = (build_pipeline(defaults(compile=mode), read_model_info(folder)) for mode in ("off", "regional"))
    assert compile_before_jobs(compiled) and compiled.warnings == [] and is_compiled(compiled.pipe.unet)
    graphs, pictures = torch._dynamo.utils.counters["stats"]["unique_graphs"], set()
    for loras in (None, {}, {"one": 0.5}, {"one": -1.0, "two": 2.0}, None):
        one, other = (generate(engine, PROMPT, seed=7, steps=4, loras=loras).pictures[0].image
                      for engine in (plain, compiled))
        assert psnr(one, other) > 50
        pictures.add(one.tobytes())
    assert len(pictures) == 4 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("name", ["torch", "architecture", "denoiser"])
def test_a_cache_for_something_else_is_named_and_not_used(cache, tmp_path, name):
    note = json.loads((cache / "sdworker.json").read_text())
    (tmp_path / "sdworker.json").write_text(json.dumps(note | {name: "of another kind"}))
    worker_run = run_workers(OURS, [job("only")],
                             {"SDWORKER_COMPILE": "cached", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
                                                   "SDWORKER_MAX_BATCH": "1"})
    answer = worker_run.answers["only"]["output"]
    assert len(answer["images"]) == 1
    other = "another denoiser" if name == "denoiser" else f"{name} of another kind"
    assert any(f"was made for {other}" in warning for warning in answer["warnings"]), answer["warnings"]
    assert "compiled in" not in worker_run.log


ONE_THREAD = """
import threading
import sdworker.serve.handler, sdworker.start.load
build_pipeline = sdworker.start.load.build_pipeline

def drawn(module, call):
    from torch._inductor import cudagraph_trees as graphs
    record = id(graphs.get_obj(graphs.local, "tree_manager_containers"))  # of a thread; torch 2.10 raises in another
    print("graphs", record, flush=True)
    print("seen", f"batch-{len(call[0])}", threading.get_ident(), flush=True)

def watched(*arguments, **more):
    print("seen load", threading.get_ident(), flush=True)
    engine = build_pipeline(*arguments, **more)
    engine.pipe.unet.register_forward_pre_hook(drawn)
    import torch
    compiler = torch.compile  # of which the first half, that traces, is enough here
    torch.compile = lambda module, mode, fullgraph: compiler(module, fullgraph=fullgraph, backend="eager")
    return engine
sdworker.start.load.build_pipeline = watched
sdworker.serve.handler.start()
"""


@pytest.mark.parametrize("load", ["background", "lazy"])
def test_one_thread_loads_and_compiles_and_draws(load):
    "A CUDA graph that was recorded in another thread cannot be replayed, and a new size not be recorded."
    odd = {"id": "odd", "input": {"prompt": [PROMPT] * 3, "guidance_scale": 1.0, "num_inference_steps": 2}}
    worker_run = run_workers([sys.executable, "-c", ONE_THREAD], [job("first"), odd, job("last")], {
        "SDWORKER_COMPILE": "reduce-overhead", "SDWORKER_MAX_BATCH": "3",
        "SDWORKER_LOAD": load}, limit=500)
    log = worker_run.log
    assert all("output" in answer and answer["output"]["warnings"] == [] for answer in worker_run.answers.values()), log
    seen = [line.split()[1:] for line in log.splitlines() if line.startswith("seen")]
    assert {what for what, _ in seen} == {"load", "batch-2", "batch-3", "batch-4", "batch-6"}
    assert len({where for _, where in seen}) == 1, seen
    assert len({line for line in log.splitlines() if line.startswith("graphs")}) == 1
    assert log.index("compiled in") < log.index("job first:"), "the first job waits for it"


CACHED = """
import logging
from sdworker.core.model_info import EMBEDDED, read_model_info
from sdworker.engine.torch_compile import is_compiled, compile_before_jobs, use_compile
from sdworker.engine.pipeline import FamilyEngine
logging.basicConfig(level="INFO", format="%(message)s")
engine = FamilyEngine(read_model_info(EMBEDDED, "embedded"))
assert use_compile(engine.pipe, "cached", engine.model, max_batch=1) == ""
compile_before_jobs(engine)
assert is_compiled(engine.pipe.unet) and not engine.warnings, engine.warnings
"""


def test_half_a_library_in_the_cache_is_compiled_anew(cache, tmp_path):
    "What is left where a compiler was killed: torch has it write in place, and loads whatever is there."
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    short, cut = sorted(tmp_path.rglob("*.main.so"))[:2]
    os.truncate(short, 20)  # "file too short"
    os.truncate(cut, 20_000)  # a bus error
    for path in (short, cut):
        os.utime(path, (0, 0))  # what is new may still be written by another compiler
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CACHED], text=True, capture_output=True,
                          env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stderr.count("is incomplete") == 2 and "compiled in" in done.stderr
    assert short.stat().st_size > 20 and cut.stat().st_size > 20_000
