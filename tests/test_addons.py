"""Weights in fewer bits, LoRAs, a refiner and a step cache, through the handler of a worker."""

import json
import os
import re
import subprocess
import sys

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from handled import handled, pixels
from PIL import Image
from safetensors.torch import save_file

from sdworker.aot.engine import package_key
from sdworker.aot.selection import unsupported_by_aot
from sdworker.build.manifest import read_manifest, verify
from sdworker.core.model_info import EMBEDDED, ModelError, read_model_info
from sdworker.core.timing import psnr
from sdworker.embedded.tiny_models import miniature, with_refiner
from sdworker.engine.build_pipeline import build_pipeline, defaults
from sdworker.engine.generate import generate
from sdworker.engine.lora_refiner import add_lora
from sdworker.engine.pipeline import FamilyEngine
from sdworker.engine.step_cache import use_step_cache
from sdworker.lab.hub_server import Hub
from sdworker.lab.quality import SWITCHES

PLAIN = {"plain": {"prompt": "a large red star on a blue background"}}
LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
LORA = {f"{LAYER}.lora_A.weight": torch.full((1, 96), 2.0), f"{LAYER}.lora_B.weight": torch.ones(96, 1)}


@pytest.fixture(scope="module")
def expected():
    """The plain picture, drawn by a worker that nobody asked for anything else."""
    answers, log = handled("embedded", PLAIN)
    assert answers["plain"]["warnings"] == [] and "imported: diffusers\n" in log, "neither torchao nor peft"
    return pixels(answers["plain"])[0]


@pytest.mark.parametrize(("setting", "value", "warning"), [
    pytest.param("QUANTIZE", "int8", "", marks=pytest.mark.slow),
    ("QUANTIZE", "denoiser=int8,text_encoder_2=int8", ""), ("QUANTIZE", "nf4", "nf4 needs a CUDA device"),
    ("STEP_CACHE", "2", ""), ("STEP_CACHE", "1", "")])
def test_a_switch_is_used_or_says_why_not(setting, value, warning, expected):
    answers, log = handled("embedded", PLAIN, **{f"SDWORKER_{setting}": value})
    assert warning in " ".join(answers["plain"]["warnings"]) and bool(answers["plain"]["warnings"]) == bool(warning)
    distance = psnr(pixels(answers["plain"])[0], expected)
    assert distance > 25 and (distance == float("inf")) == (bool(warning) or value == "1")
    imported = log.rpartition("imported:")[2]
    assert ("torchao" in imported) == (setting == "QUANTIZE") and "peft" not in imported


def test_without_a_lora_peft_is_not_imported_even_without_fast_imports():
    log = handled("embedded", PLAIN, SDWORKER_LEAN="off")[1]
    assert "torch._dynamo" in log and "peft" not in log.rpartition("imported:")[2]


def test_a_transformer_in_eight_bits(tmp_path):
    folder = miniature("FluxPipeline", tmp_path / "flux")
    answers, _ = handled(folder, {"one": {}}, SDWORKER_QUANTIZE="denoiser=int8,text_encoder_2=int8")
    assert answers["one"]["warnings"] == [] and pixels(answers["one"])[0].shape == (64, 64, 3)


def test_a_transformer_with_a_step_cache_begins_from_a_picture_and_survives_a_job_that_failed(tmp_path):
    engine = FamilyEngine(read_model_info(miniature("FluxPipeline", tmp_path / "flux")))
    assert use_step_cache(engine, 2) == ""
    expected = generate(engine, "a red star", seed=7, steps=8).pictures[0].image
    assert generate(engine, "a red star", seed=7, steps=8, image=expected).pictures

    def stop(done, total, latents):
        if done == 4:
            raise KeyError("stopped")
    with pytest.raises(KeyError):
        generate(engine, ["a blue star"] * 2, seed=8, steps=8, on_step=stop)
    assert generate(engine, "a red star", seed=7, steps=8).pictures[0].image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("family", ["FluxPipeline", "QwenImagePipeline"])  # diffusers has none for SD 3.5
def test_a_step_cache_of_a_transformer_draws_a_likeness(family, tmp_path):
    model, fields = read_model_info(miniature(family, tmp_path / "model")), {"prompt": "a red star", "seed": 7,
                                                                            "steps": 12}
    plain, kept = FamilyEngine(model), FamilyEngine(model)
    assert use_step_cache(kept, 2) == ""
    distance = psnr(*(generate(engine, **fields).pictures[0].image for engine in (plain, kept)))
    assert SWITCHES["step cache: 2"].min_psnr < distance < float("inf")


@pytest.mark.parametrize(("family", "spelling", "layer"), [
    ("FluxPipeline", "transformer.{}.lora_{}.weight", "transformer_blocks.0.attn.to_q"),
    ("QwenImagePipeline", "{}.lora_{}.weight", "transformer_blocks.0.attn.to_q"),
    ("ZImagePipeline", "diffusion_model.{}.lora_{}.weight", "layers.0.attention.to_q")])
def test_a_lora_of_a_transformer_keeps_its_alpha(family, spelling, layer, tmp_path):
    pipe = FamilyEngine(read_model_info(miniature(family, tmp_path / "model"))).pipe
    path, weight = tmp_path / "one.safetensors", pipe.transformer.get_submodule(layer).weight
    before, width = weight.clone(), weight.shape[1]
    a, b = (spelling.format(layer, part) for part in "AB")
    save_file({a: torch.ones(2, width), b: torch.ones(len(weight), 2),
               a.replace("lora_A.weight", "alpha"): torch.tensor(1.0)}, path)
    assert add_lora(pipe, path) == 1
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    assert torch.allclose(pipe.transformer.get_submodule(layer).weight, before + 1.0), "two ones each, times 1 / 2"


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_a_lora_of_stable_diffusion_3_has_its_alpha_in_the_notes_or_is_refused(alpha, tmp_path):
    pipe = FamilyEngine(read_model_info(miniature("StableDiffusion3Pipeline", tmp_path / "model"))).pipe
    path, layer = tmp_path / "one.safetensors", "transformer_blocks.0.attn.to_q"
    weight = pipe.transformer.get_submodule(layer).weight
    tensors = {f"transformer.{layer}.lora_A.weight": torch.ones(2, weight.shape[1]),
               f"transformer.{layer}.lora_B.weight": torch.ones(len(weight), 2)}
    if alpha:
        save_file(tensors | {f"transformer.{layer}.alpha": torch.tensor(alpha)}, path)
        with pytest.raises(ModelError, match="cannot be read as a LoRA for StableDiffusion3Pipeline"):
            add_lora(pipe, path)
        return
    notes = {"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.target_modules": [layer]}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(notes)})
    assert add_lora(pipe, path) == 1
    delta = pipe.transformer.get_submodule(layer).get_delta_weight("lora")
    assert torch.allclose(delta, torch.ones_like(delta)), "two ones each, times 1 / 2"


@pytest.mark.parametrize(("family", "why"), [
    ("PixArtSigmaPipeline", "cannot be read as a LoRA for PixArtSigmaPipeline"),
    ("StableDiffusionPipeline", "is for another model: unet.down_blocks.1.")])
def test_a_lora_that_no_layer_is_for_is_refused(family, why, tmp_path):
    pipe = FamilyEngine(read_model_info(miniature(family, tmp_path / "model"))).pipe
    save_file(LORA, path := tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match=f"one.safetensors {re.escape(why)}"):
        add_lora(pipe, path)


def test_loras_and_a_refiner_that_were_baked_take_part(tmp_path, expected):
    folder = with_refiner(tmp_path / "model")
    (folder / "loras").mkdir()
    save_file(LORA, folder / "loras" / "one.safetensors")
    fields = PLAIN["plain"]
    jobs = {"refined": fields, "unwanted": fields | {"negative_prompt": "green"},
            "base": fields | {"refiner_start": 1.0},
            "end": fields | {"refiner_start": 0.8, "guidance_stop": 0.5}, "ended": fields | {"guidance_stop": 0.5}}
    answers, log = handled(folder, jobs)
    assert "LoRA one.safetensors: 1 layers, scale 1" in log and "stubs" not in log
    assert log.rpartition("imported:")[2].split() == ["peft", "diffusers"], "and not the compiler"
    refined, unwanted, base = (pixels(answers[name])[0] for name in ("refined", "unwanted", "base"))
    assert np.abs(refined - base).max() > 0 and np.abs(refined - unwanted).max() > 0
    assert answers["end"]["error"].startswith("refiner_start is 0.8: it is for a model with a refiner")
    assert (pixels(answers["ended"])[0] != base).any() and answers["ended"]["warnings"] == [], "the base draws alone"
    without, _ = handled(folder, {"base": jobs["base"]}, SDWORKER_LORA_SCALE="0")
    assert psnr(pixels(without["base"])[0], expected) > 50 > psnr(base, expected)


@pytest.mark.slow
def test_a_lora_that_is_fused_at_bake_is_part_of_the_model(tmp_path, expected):
    save_file(LORA, tmp_path / "style.safetensors")
    (style := tmp_path / "style").mkdir()
    (tmp_path / "style.safetensors").rename(style / "style.safetensors")
    with Hub({"shapes/embedded": EMBEDDED, "owner/style": style}) as hub:
        addons = f"lora=owner/style@{hub.commit('owner/style')}:style.safetensors"
        command = [sys.executable, "-m", "sdworker.cli.main", "bake", "shapes/embedded", "--addons", addons, "--to"]
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub")}
        adapters, fused = tmp_path / "beside", tmp_path / "fused"
        for more in ([adapters], [fused, "--fuse-loras", "1.0"], [fused, "--fuse-loras", "1.0"]):
            done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        assert "with LoRAs fused at scale 1" in done.stdout
    assert verify(fused) and read_manifest(fused)["fused"]["loras"][0]["repository"] == "owner/style"
    drawn, log = handled(fused, PLAIN)
    adapter, _ = handled(adapters, PLAIN)
    assert "peft" not in log.rpartition("imported:")[2] and drawn["plain"]["warnings"] == []
    drawn, adapter = (pixels(answers["plain"])[0] for answers in (drawn, adapter))
    assert psnr(drawn, adapter) > 50 > psnr(drawn, expected)
    models = [read_model_info(folder) for folder in (adapters, fused)]
    assert [unsupported_by_aot(defaults(), model) != "" for model in models] == [True, False], "compiled code may draw"
    assert package_key(models[1])["model"] == package_key(read_model_info(EMBEDDED))["model"], (
        "any that fits the plain model")


def test_a_fused_lora_has_no_scale_to_set():
    answers, _ = handled("embedded", PLAIN, SDWORKER_LORA_SCALE="0.5")
    assert answers["plain"]["warnings"] == [
        "SDWORKER_LORA_SCALE is 0.5, and there is no LoRA beside the model whose scale could change."]


def test_a_refiner_that_was_not_baked_is_missed_in_a_sentence():
    answers, _ = handled("embedded", {"refined": PLAIN["plain"] | {"refiner_start": 0.8}})
    assert answers["refined"]["error"].startswith("refiner_start is 0.8: it is for a model with a refiner")


def test_a_refiner_has_the_switches_of_its_base(tmp_path):
    model = read_model_info(with_refiner(tmp_path / "model"))
    engine = build_pipeline(defaults(attention="sliced", channels_last=True), model)
    for unet in (engine.pipe.unet, engine.refine.pipe.unet):
        assert {type(one).__name__ for one in unet.attn_processors.values()} == {"SlicedAttnProcessor"}
        assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def offloaded(monkeypatch):
    """An engine as for a GPU, whose hooks move weights from the processor to the processor."""
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        enable = getattr(DiffusionPipeline, name)
        monkeypatch.setattr(DiffusionPipeline, name, lambda pipe, device, enable=enable: enable(pipe, device="cpu"))
    by_layer = accelerate.cpu_offload  # which takes diffusers' "cpu:0" for another device than "cpu"
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, _, **more: by_layer(model, "cpu", **more))

    def build(model, dtype="float32", **settings):
        engine = build_pipeline(defaults(**settings), model, "cuda", dtype)
        engine.device = "cpu"  # whose clock times the stages
        return engine
    return build


@pytest.fixture
def on_gpu(monkeypatch):
    """The networks that hooks have on the GPU at each call of one, by the hooks' own rule."""
    now, moments = [], []

    def comes(hook, network, *inputs, **named):
        leaves = hook.prev_module_hook and hook.prev_module_hook.model
        now[:] = [one for one in now if one is not leaves and one is not network] + [network]
        moments.append(list(now))
        return inputs, named

    def goes(hook, network):
        now[:] = [one for one in now if one is not network]
        return network
    monkeypatch.setattr(CpuOffload, "pre_forward", comes)
    monkeypatch.setattr(CpuOffload, "init_hook", goes)
    return moments


def test_base_and_refiner_take_turns_on_the_gpu_even_after_a_job_that_failed(tmp_path, offloaded, on_gpu):
    engine = offloaded(read_model_info(with_refiner(tmp_path / "model")), offload="model")
    assert engine.warnings == []

    def stop(done, total, latents):
        raise KeyError("stopped")
    for on_step in (None, stop, None):
        try:
            generate(engine, "a red star", seed=7, steps=10, on_step=on_step)
        except KeyError:
            assert on_step
    drawn = {id(network) for moment in on_gpu for network in moment}
    assert {id(engine.pipe.unet), id(engine.refine.pipe.unet), id(engine.pipe.vae)} < drawn
    texts = {id(engine.pipe.text_encoder), id(engine.pipe.text_encoder_2)}  # which diffusers has there together
    together = [moment for moment in on_gpu if len(moment) > 1 and not set(map(id, moment)) <= texts]
    assert not together, "two at a time are what a small GPU has no room for"


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_an_offloaded_model_draws_the_same_from_noise_and_from_pictures_and_in_tiles(tmp_path, offloaded, offload):
    folder = with_refiner(tmp_path / "model")
    (folder / "loras").mkdir()
    save_file(LORA, folder / "loras" / "one.safetensors")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": True}))  # as SDXL's own
    model, dtype = read_model_info(folder), "float16"
    resident = build_pipeline(defaults(vae_decode="tiled"), model, dtype=dtype)
    moved = offloaded(model, dtype, vae_decode="tiled", offload=offload)
    picture = Image.new("RGB", (64, 64), "red")
    for fields in ({}, {"image": picture}, {"image": picture, "mask_image": Image.new("L", (64, 64), 255)}, {"n": 2}):
        pairs = zip(*(generate(engine, "a red star", seed=7, steps=10, **fields).pictures
                      for engine in (resident, moved)), strict=True)
        assert all(psnr(one.image, other.image) > 50 for one, other in pairs), fields
        assert moved.pipe.vae.dtype == torch.float32, "half precision overflows there"
    networks = (moved.pipe.unet, moved.refine.pipe.unet, moved.pipe.vae)
    assert all(network._hf_hook for network in networks)
    assert all(weight.is_meta == (offload == "sequential") for network in networks for weight in network.parameters())


def test_a_refiner_has_as_few_bits_as_its_base_and_is_not_compiled(tmp_path):
    model = read_model_info(with_refiner(tmp_path / "model"))
    engine = build_pipeline(defaults(quantize="int8"), model)
    base, refiner = (type(one.pipe.unet.mid_block.attentions[0].proj_in.weight) for one in (engine, engine.refine))
    assert base is refiner is not torch.nn.Parameter and engine.warnings == []
    assert generate(engine, "a red star", seed=7, steps=10).warnings == []
    assert "not used for the refiner" in " ".join(build_pipeline(defaults(compile="regional"), model).warnings)
