"""The AOT engine: real workers at a queue, damaged packages, requests out of range, and memory."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from handled import PROMPT, handled, job, pixels
from PIL import Image
from safetensors.torch import load_file, save_file

from sdworker.aot.engine import AotEngine, digest_of, package_key, unsupported_reason
from sdworker.aot.export import export_package, missing_toolchain
from sdworker.core.model_info import EMBEDDED, Unsuited, read_model_info
from sdworker.core.timing import psnr
from sdworker.embedded.shapes import judge
from sdworker.embedded.tiny_models import add_safety_checker, miniature
from sdworker.engine.diffusers_pipeline import DiffusersEngine
from sdworker.engine.generate import generate
from sdworker.engine.types import SamplingParams
from sdworker.lab.bench_aot import same_pictures
from sdworker.lab.queue_server import WorkerRun, run_workers
from sdworker.serve.image_io import data_uri, from_data_uri

ROOT = Path(__file__).parent.parent
OURS = [sys.executable, "-m", "sdworker.cli.main", "start"]
MODEL = read_model_info(EMBEDDED, "embedded")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing_toolchain()), reason=missing_toolchain())]


@pytest.fixture(scope="module")
def package() -> Path:
    """The embedded model's AOT package, made once (`make aot`) and kept in out/."""
    return export_package(MODEL, ROOT / "out" / "aot")


@pytest.fixture
def copy(package, tmp_path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "the packages" / "one"))


def started(aot_dir: Path, jobs: list[dict], **settings: str) -> WorkerRun:
    return run_workers(OURS, jobs, {"SDWORKER_AOT_DIR": str(aot_dir), **settings})


def drawn(worker_run: WorkerRun, name: str) -> dict:
    """An answer, whose picture must be what was asked for."""
    assert "output" in worker_run.answers.get(name, {}), worker_run.log
    answer = worker_run.answers[name]["output"]
    assert all(judge(from_data_uri(answer["images"][0]), PROMPT).values())
    return answer


def test_a_worker_draws_with_the_aot_engine_and_hands_over_what_that_cannot_do(package):
    small = {"width": 24, "height": 24, "num_inference_steps": 2}
    worker_run = started(package.parent, [job("first"), job("small", **small), job("smaller", **small), job("last")])
    first, last = drawn(worker_run, "first"), drawn(worker_run, "last")
    rows = first["timings"]["cold_start"]
    assert "check package" in rows and not {"transformers", "diffusers"} & set(rows)
    assert first["warnings"] == last["warnings"] == [] and first["images"] == last["images"]
    for name in ("small", "smaller"):
        answer = worker_run.answers[name]["output"]
        assert from_data_uri(answer["images"][0]).size == (24, 24)
        assert any(text.startswith("Drawn by the diffusers engine, not the AOT engine: width is 24, and the AOT "
                                   "engine draws 32 to 2048, in steps of 8.") for text in answer["warnings"])
    assert worker_run.log.count("the diffusers engine draws such requests") == 1, "said once"
    pipeline = generate(DiffusersEngine(MODEL), PROMPT, width=24, height=24, steps=2, seed=7).pictures[0].image
    ours = from_data_uri(worker_run.answers["small"]["output"]["images"][0])
    assert np.abs(np.asarray(ours, int) - np.asarray(pipeline, int)).max() <= 2, "the diffusers engine's picture"


def test_a_safety_checker_reads_what_the_aot_engine_has_drawn(package, tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    add_safety_checker(folder, generate(DiffusersEngine(MODEL), PROMPT, seed=7).pictures[0].image)
    before = ("import atexit, sys; from sdworker.start.load import initialize_model\n"
              "atexit.register(lambda: print('engine:', type(initialize_model()).__name__, file=sys.stderr))\n")
    jobs = {"two": {"prompt": [PROMPT, "a small green cross on a white background"]}}
    answers, log = handled(folder, jobs, before, SDWORKER_AOT_DIR=str(package.parent), SDWORKER_SAFETY_CHECKER="1")
    assert answers["two"]["flagged"] == [True, False] and answers["two"]["warnings"] == []
    assert "engine: AotWithFallback" in log and "stubs" not in log and "black image" not in log


def edited(folder: Path, **key: str) -> None:
    about = json.loads((folder / "aot.json").read_text())
    about["key"] |= key
    about["digest"] = digest_of(about)
    (folder / "aot.json").write_text(json.dumps(about))


def one_byte(folder: Path) -> None:
    code = bytearray((folder / "denoiser.pt2").read_bytes())
    code[-1000] ^= 1
    (folder / "denoiser.pt2").write_bytes(code)


def no_code(folder: Path) -> None:
    """A file that is what its hash says, and not what torch can open."""
    (folder / "vae.pt2").write_bytes(b"nothing")
    about = json.loads((folder / "aot.json").read_text())
    about["files"]["vae.pt2"] = hashlib.sha256(b"nothing").hexdigest()
    about["digest"] = digest_of(about)
    (folder / "aot.json").write_text(json.dumps(about))


def half_written(folder: Path) -> None:
    text = (folder / "aot.json").read_text()
    (folder / "aot.json").write_text(text[:len(text) // 2])


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda folder: edited(folder, torch="2.12.0"), f"torch (2.12.0, and here it is {torch.__version__})"),
    (lambda folder: edited(folder, architecture="x86-64-v4"), "another instruction set (x86-64-v4, and here it is"),
    (one_byte, "denoiser.pt2 in it is damaged"),
    (half_written, "its aot.json is damaged"),
    (lambda folder: (folder / "text.pt2").unlink(), "text.pt2 in it cannot be read"),
    (no_code, "cannot be opened"),
], ids=["torch", "instructions", "one byte", "half a manifest", "a file missing", "no code"])
def test_a_package_that_does_not_fit_is_refused_and_diffusers_draws(copy, damage, reason):
    damage(copy)
    worker_run = started(copy.parent, [job("first"), job("second")])
    for name in ("first", "second"):
        warning, = drawn(worker_run, name)["warnings"]
        assert warning.startswith("Drawn by the diffusers engine: ") and reason in warning, warning
    assert worker_run.log.count("drawing with the diffusers engine: ") == 1 and "Traceback" not in worker_run.log


def test_what_is_being_made_is_not_looked_at(copy):
    copy.rename(copy.parent.parent / "one")
    (copy.parent / ".making-one").mkdir()
    shutil.move(copy.parent.parent / "one", copy.parent / ".making-one" / "aot")
    worker_run = started(copy.parent, [job("first")])
    answer = drawn(worker_run, "first")
    assert answer["warnings"] == [] and "diffusers" in answer["timings"]["cold_start"]


def test_a_worker_that_must_have_a_package_ends_without_one(tmp_path):
    worker_run = run_workers(OURS, [job("first")], {"SDWORKER_AOT_DIR": str(tmp_path), "SDWORKER_ENGINE": "aot"},
                             stop=False)
    text = worker_run.answers["first"]["error"]
    assert text.startswith("SDWORKER_ENGINE is 'aot', and there is none in ") and "sdworker bake --aot" in text
    assert worker_run.code == 1


def test_a_worker_leaves_nothing_in_the_temporary_folder(package, tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    drawn(started(package.parent, [job("first")], TMPDIR=str(folder)), "first")
    assert not list(folder.rglob("*.so"))


def test_a_switch_that_the_aot_engine_does_not_have_is_named(package):
    worker_run = run_workers(OURS, [job("first")], {"SDWORKER_AOT_DIR": str(package.parent), "SDWORKER_ENGINE": "aot",
                                                    "SDWORKER_STEP_CACHE": "2"}, stop=False)
    assert "SDWORKER_STEP_CACHE is for the diffusers engine alone" in worker_run.answers["first"]["error"]


def test_a_worker_with_the_aot_engine_alone_refuses_what_that_cannot_do(package):
    worker_run = started(package.parent, [job("wrong", width=24), job("right")], SDWORKER_ENGINE="aot")
    assert worker_run.answers["wrong"]["error"] == ("width is 24, and the AOT engine draws 32 to 2048, in steps of 8; "
                                                    "SDWORKER_ENGINE=auto hands such requests to the diffusers engine.")
    drawn(worker_run, "right")


IMPORTED = """
import json, sys
import sdworker.start.timeline
import sdworker.serve.answer
respond = sdworker.serve.answer.respond
async def and_list(*arguments):
    answer = await respond(*arguments)
    modules = [name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None)]
    return answer | {"modules": modules}
sdworker.serve.answer.respond = and_list
from sdworker.cli.main import app
app(["start"])
"""
SDK = """aiodns aiohappyeyeballs aiohttp aiohttp_retry aiosignal attr backoff backports brotli certifi
    charset_normalizer defusedxml frozenlist idna multidict propcache pycares requests runpod tomli tqdm tqdm_loggable
    urllib3 yarl"""
COMMAND_AND_SETTINGS = """annotated_doc annotated_types dotenv pydantic pydantic_core pydantic_settings sdworker
    shellingham typer typing_extensions typing_inspection"""
DRAWING = "PIL numpy safetensors tokenizers torch torchgen"


def test_a_part_compiled_where_libstdcxx_is_linked_into_every_library_is_opened(tmp_path):
    """As on a rented machine with an H100, whose compiler did so: the process that opened it crashed."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-shared*) set -- "$@" -static-libstdc++;; esac\n'
                        f'exec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)
    code = ("import sys, torch; from pathlib import Path; from sdworker.aot.engine import open_part; "
            "from sdworker.aot.export import package; file = Path(sys.argv[1]); "
            "package(torch.nn.Linear(8, 8), (torch.ones(2, 8),), file); open_part(file)")
    environment = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "part.pt2"], check=True,
                   env=os.environ | environment)


def test_what_a_start_imports_before_the_first_picture_is_counted(package):
    """A budget: packages by name, and all modules; 1,460 were counted when it was made, a pipeline needs 3,000."""
    worker_run = run_workers([sys.executable, "-c", IMPORTED], [job("first")],
                             {"SDWORKER_AOT_DIR": str(package.parent), "SDWORKER_ENGINE": "aot"})
    modules = drawn(worker_run, "first")["modules"]
    packages = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    new = {name for name in packages if not name.startswith("_") and "mypyc" not in name}
    assert new <= {*SDK.split(), *COMMAND_AND_SETTINGS.split(), *DRAWING.split()}, "a start has begun to import more"
    assert len(modules) < 1600 and not {"torch._dynamo", "torch._inductor", "torch._meta_registrations"} & set(modules)


def test_fifty_requests_out_of_range_get_a_sentence(package):
    engine = AotEngine(MODEL, package)
    sizes = [(w, h) for w, h in product((0, 8, 24, 31, 33, 64, 100, 2056, 4096), repeat=2) if (w, h) != (64, 64)][:40]
    wrong = [SamplingParams(*size, 20, 3.0) for size in sizes
             if not all(32 <= s <= 2048 and s % 8 == 0 for s in size)]
    wrong += [SamplingParams(64, 64, steps, 3.0) for steps in (0, -1, 101, 102, 500, 999, 1000)]
    wrong += [SamplingParams(64, 64, 20, 3.0, sampler) for sampler in ("heun", "EULER", "unipc", "none")]
    assert len(wrong) >= 50
    for params in wrong:
        assert unsupported_reason(engine, params), params
        with pytest.raises(Unsuited, match=r"AOT"):
            engine.route(params, [])


ANSWERS = """
import json, sys
from sdworker.serve.handler import handler
print(json.dumps([handler({"id": "one", "input": payload}) for payload in json.load(sys.stdin)]))
"""


def test_fifty_jobs_out_of_range_get_a_sentence_and_the_worker_goes_on(package):
    """The same through the handler of a worker with the AOT engine alone."""
    sides = [(w, h) for w, h in product((0, 8, 24, 31, 33, 100, 2056, 4096), repeat=2)][:40]
    wrong = [{"width": w, "height": h} for w, h in sides]
    wrong += [{"num_inference_steps": steps} for steps in (0, -1, 101, 1000, "many")]
    wrong += [{"scheduler": name} for name in ("heun", "SPEED", "unipc")]
    wrong += [{"num_images": n} for n in (0, -1, 1000)] + [{"guidance_scale": -1}, {"seed": -2}, {"width": "wide"}]
    assert len(wrong) >= 50
    jobs = [job("", **fields)["input"] for fields in [*wrong, {}]]
    variables = {"SDWORKER_AOT_DIR": str(package.parent), "SDWORKER_ENGINE": "aot"}
    done = subprocess.run([sys.executable, "-c", ANSWERS], input=json.dumps(jobs), env=os.environ | variables,
                          capture_output=True, text=True, check=True)
    *answers, right = json.loads(done.stdout)
    for fields, answer in zip(wrong, answers, strict=True):
        text = answer.get("error", "")
        assert any(name in text for name in fields) and len(text) < 300, (fields, answer)
    assert all(judge(from_data_uri(right["images"][0]), PROMPT).values())


def test_the_compiled_parts_are_never_called_with_what_they_were_not_made_for(package):
    """Without the check some of these come back with a wrong shape and no error."""
    engine = AotEngine(MODEL, package)
    text, pooled, sizes = torch.zeros(2, 77, 128), torch.zeros(2, 64), torch.zeros(2, 6)
    good = [torch.zeros(2, 4, 16, 16), torch.zeros(2), text, pooled, sizes]
    assert engine.run("denoiser", *good)[0].shape == (2, 4, 16, 16)
    shapes = [(2, 4, 15, 16), (2, 3, 16, 16), (3, 4, 16, 16), (2, 4, 4, 16), (2, 4, 16, 514), (4, 16, 16)]
    wrong = {0: [*map(torch.zeros, shapes), torch.zeros(2, 4, 16, 16).half()],
             1: [torch.zeros(1), torch.zeros(2, 1), torch.zeros(2).int()], 2: [torch.zeros(2, 76, 128), text.double()],
             3: [torch.zeros(2, 65)], 4: [torch.zeros(2, 5)]}
    for place, tensors in wrong.items():
        for tensor in tensors:
            with pytest.raises(Unsuited, match="should be"):
                engine.run("denoiser", *good[:place], tensor, *good[place + 1:])
    for part, shape in (("vae", (1, 4, 7, 16)), ("vae", (1, 4, 6, 16)), ("text", (1, 77))):
        with pytest.raises(Unsuited, match=r"should be|expected"):
            engine.run(part, torch.zeros(shape))


def test_a_hundred_pairs_are_drawn_the_same(package):
    """By four samplers, at three sizes and one that is not square; results/aot.json holds 700."""
    result = same_pictures(AotEngine(MODEL, package), DiffusersEngine(MODEL), 15)
    assert result["passed"] and result["pairs"] >= 100, result


@pytest.mark.timeout(1200)
def test_the_suite_for_a_model_of_five_hundred_megabytes_runs_in_small(tmp_path):
    """That its weights are held once is in the record, results/aot.json."""
    command = [sys.executable, "-m", "sdworker.lab.bench_aot", "--tiny", "--record", tmp_path, "--scratch", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((tmp_path / "aot-tiny.json").read_text())
    assert report["memory"]["weights"] >= 500e6 and report["memory"]["ratio"] > 0, report["memory"]
    assert report["starts"]["aot"]["rows"]["total"] > 0 and set(report["images"]) == {"1", "4"}
    assert report["compile"]["first_call"] > 0 and report["bake"]["bytes"] > 0


@pytest.mark.timeout(900)
def test_stable_diffusion_1_is_compiled_as_well(tmp_path):
    """One text encoder, no sizes, no zeros for an empty prompt, and a sampler of its own that no table holds."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    pipe = DiffusersEngine(MODEL).pipe
    sdxl = ("addition", "projection")
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith(sdxl)}
    unet = UNet2DConditionModel.from_config(config | {"cross_attention_dim": 64, "layers_per_block": 1})
    StableDiffusionPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=unet, feature_extractor=None,
        scheduler=PNDMScheduler(skip_prk_steps=True), safety_checker=None, requires_safety_checker=False,
    ).save_pretrained(tmp_path / "model")
    model = read_model_info(tmp_path / "model")
    engine = AotEngine(model, export_package(model, tmp_path / "aot"))  # which verifies it with every sampler
    assert engine.about["psnr"] > 40 and set(engine.parts) == {"text", "denoiser", "vae"}
    assert unsupported_reason(engine, SamplingParams(64, 64, 20, 7.5)) == (
        "the AOT engine has no table of the scheduler of the model")
    assert unsupported_reason(engine, SamplingParams(64, 64, 20, 7.5, "ddim")) == ""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("pipeline, bits", [("StableDiffusion3Pipeline", "off"), ("FluxPipeline", "int8")])
def test_transformers_are_compiled_and_need_no_diffusers(pipeline, bits, tmp_path):
    folder, quantize = miniature(pipeline, tmp_path / "tiny"), {"SDWORKER_QUANTIZE": bits}
    export_package(read_model_info(folder), tmp_path / "aot", quantize=bits)
    jobs = {"plain": {}, "wide": {"width": 128, "height": 64, "num_images": 3}, "guided": {"guidance_scale": 9.0},
            "alone": {"width": 128, "height": 64, "seed": 8}, "few": {"num_inference_steps": 1},
            "other": {"prompt": "a blue ring"}, "unwanted": {"negative_prompt": "blue"},
            "long": {"prompt": "zanzibar " * 99, "negative_prompt": "zanzibar " * 99, "guidance_scale": 3.0}}
    theirs, _ = handled(folder, jobs, SDWORKER_ENGINE="diffusers", **quantize)
    ours, log = handled(folder, jobs, SDWORKER_ENGINE="aot", SDWORKER_AOT_DIR=str(tmp_path / "aot"), **quantize)
    assert log.rstrip().endswith("imported:"), "neither diffusers nor torchao"
    assert ours["long"]["warnings"] == theirs["long"]["warnings"]
    assert "left out the last" in ours["long"]["warnings"][-1]
    assert "zanzibar" not in "".join(log.split())
    for name in jobs:
        assert min(psnr(*both) for both in zip(pixels(ours[name]), pixels(theirs[name]), strict=True)) > 50, name
    plain = pixels(ours["plain"])[0]
    assert all((pixels(ours[name])[0] != plain).any() for name in ("guided", "few", "other"))
    assert (pixels(ours["unwanted"])[0] != plain).any() == read_model_info(folder).family.negative
    assert np.abs(pixels(ours["wide"])[1] - pixels(ours["alone"])[0]).max() <= 2, "the same alone and in a batch"
    begun = {"image": data_uri(Image.new("RGB", (64, 64), "red")), "num_inference_steps": 4}
    both, log = handled(folder, {"first": {}, "begun": begun}, SDWORKER_AOT_DIR=str(tmp_path / "aot"), **quantize)
    assert both["first"]["warnings"] == [] and "begins from a picture" in both["begun"]["warnings"][0]
    assert both["begun"]["images"] and "diffusers" in log.rpartition("imported:")[2]


def test_long_prompts_and_weights_are_handed_over_and_not_logged(package):
    long = "zanzibar " * 40
    jobs = {"short": {}, "long": {"prompt": long}, "negative": {"negative_prompt": long},
            "weighted": {"prompt": "a (red:1.3) star", "prompt_syntax": "weighted"}}
    answers, log = handled("embedded", jobs, SDWORKER_AOT_DIR=str(package.parent))
    reasons = {name: (answers[name]["warnings"] or [""])[0].partition("not the AOT engine: ")[2] for name in jobs}
    assert reasons["short"] == "" and reasons["weighted"].startswith("prompt_syntax is weighted")
    assert all(reasons[name].startswith("a prompt is longer than the 75 tokens") for name in ("long", "negative"))
    assert "zanzibar" not in "".join(log.split())
    refused, _ = handled("embedded", jobs, SDWORKER_AOT_DIR=str(package.parent), SDWORKER_ENGINE="aot")
    assert refused["long"]["error"].startswith("a prompt is longer than the 75 tokens that the AOT engine reads;")


def test_a_package_in_eight_bits_is_for_the_weights_that_it_was_made_of(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    model = read_model_info(folder)
    keys = [{bits: package_key(model, quantize=bits)["model"] for bits in ("off", "int8")}]
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    save_file(weights | {name: weights[name] * 1.01}, path)
    keys.append({bits: package_key(model, quantize=bits)["model"] for bits in ("off", "int8")})
    assert keys[0]["off"] == keys[1]["off"] and keys[0]["int8"] != keys[1]["int8"]
