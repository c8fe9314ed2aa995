"""Each family of models, in miniature, through the handler: shapes, seeds, batches, pictures, switches, refusals."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from handled import handled, pixels
from PIL import Image

import sdworker
from sdworker.build.locate import locate
from sdworker.build.single_file import bake_file
from sdworker.core.families import FAMILIES, Family
from sdworker.core.model_info import EMBEDDED, ModelError, read_model_info
from sdworker.core.settings import Settings
from sdworker.embedded.tiny_models import MINIATURES, miniature, single_file
from sdworker.serve.image_io import data_uri

RED, BLUE, MASK = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue"), Image.new("L", (64, 64))
MASK.paste(255, (32, 0, 64, 64))


@pytest.mark.parametrize("pipeline", [
    "StableDiffusionXLPipeline", "PixArtSigmaPipeline", *(
        name for name, family in FAMILIES.items() if name in MINIATURES and not family.edits)])
def test_a_family_draws_through_the_handler(pipeline, tmp_path):
    folder = miniature(pipeline, tmp_path / "tiny") if pipeline in MINIATURES else EMBEDDED
    family, known = read_model_info(folder).family, pipeline in FAMILIES
    answers, log = handled(folder, {
        "batch": {"width": 64, "height": 48, "num_images": 3}, "alone": {"width": 64, "height": 48, "seed": 8},
        "unwanted": {"negative_prompt": "blue"}, "plain": {},
        "unguided": {"guidance_scale": family.unguided, "negative_prompt": "blue"},
        "little": {"guidance_scale": 0.5, "negative_prompt": "blue"},
        "sampler": {"scheduler": "euler"}, "odd": {"width": 50}, "strength": {"strength": 0.5},
        "end": {"guidance_stop": 0.5},
    }, SDWORKER_ATTENTION="sliced")
    batch, (alone,) = pixels(answers["batch"]), pixels(answers["alone"])
    assert answers["batch"]["seeds"] == [7, 8, 9] and {image.shape for image in batch} == {(48, 64, 3)}
    assert np.abs(batch[1] - alone).max() <= 2, "the same alone and in a batch"
    assert np.abs(batch[0] - batch[1]).max() > 2
    assert pixels(answers["plain"])[0].shape == (64, 64, 3), "the side that the model was made for"
    changed = np.abs(pixels(answers["unwanted"])[0] - pixels(answers["plain"])[0]).max() > 0
    warned = [" ".join(answers[name]["warnings"]) for name in ("unwanted", "unguided")]
    assert changed == family.negative and ("negative_prompt changes nothing" in warned[0]) != family.negative
    assert "negative_prompt changes nothing" in warned[1]
    assert family.unguided == 1 or "negative_prompt" not in " ".join(answers["little"]["warnings"])
    assert ("which this worker does not know" in warned[0]) != known
    refused = {name: answers[name]["error"] for name in ("odd", "strength")}
    assert refused["odd"].startswith("width is 50") and refused["strength"].startswith("strength is 0.5")
    assert ("images" in answers["sampler"]) == ("images" in answers["end"]) == bool(family.samplers)
    unet = read_model_info(folder).denoiser == "unet"
    attention = "enabled" if unet else "not used: this model's layers cannot be sliced"
    assert f"sliced {attention}" in log


@pytest.mark.parametrize(("pipeline", "name"), [
    ("StableDiffusionXLPipeline", "lightning"), ("StableDiffusionXLPipeline", "lcm"),
    *((pipeline, name) for pipeline, family in FAMILIES.items() if not family.samplers for name in family.few_step)])
def test_a_few_step_model_is_recognised_by_its_name(pipeline, name, tmp_path):
    folder, few_step = tmp_path / f"tiny-{name}", FAMILIES[pipeline].few_step[name]
    miniature(pipeline, folder) if pipeline in MINIATURES else shutil.copytree(EMBEDDED, folder)
    explicit = {"num_inference_steps": few_step.steps, "guidance_scale": few_step.guidance}
    jobs = {"auto": {}, "explicit": explicit, "more": explicit | {"num_inference_steps": few_step.steps + 1}}
    answers, _ = handled(folder, jobs)
    auto, same, more = (pixels(answers[name])[0] for name in jobs)
    assert np.array_equal(auto, same) and not np.array_equal(auto, more)


def test_what_an_unknown_class_does_not_take_is_refused(tmp_path):
    """Latent consistency models take neither a negative prompt nor another guidance's argument, and have a sibling."""
    folder = miniature("LatentConsistencyModelPipeline", tmp_path / "tiny")
    (folder / "sdworker.json").write_text('{"side": 64}')  # nothing of steps and guidance
    answers, _ = handled(folder, {"plain": {}, "unwanted": {"negative_prompt": "blue"}, "explicit": {
        "num_inference_steps": 4, "guidance_scale": 8.5}, "image": {"image": data_uri(RED)}})
    assert answers["unwanted"]["error"].startswith("negative_prompt is of no use to a LatentConsistencyModelPipeline")
    assert np.array_equal(pixels(answers["plain"])[0], pixels(answers["explicit"])[0]), "by the class's own defaults"
    assert pixels(answers["image"])[0].shape == (64, 64, 3)


@pytest.mark.parametrize("pipeline", ["StableDiffusionXLPipeline", *(
    pytest.param(name, marks=[pytest.mark.slow] * (name != "FluxPipeline"))
    for name, family in FAMILIES.items() if family.from_image and name in MINIATURES)])
def test_a_family_begins_from_a_picture(pipeline, tmp_path):
    folder = miniature(pipeline, tmp_path / "tiny") if pipeline in MINIATURES else "embedded"
    red, mask, steps = data_uri(RED), data_uri(MASK), {"num_inference_steps": 4}
    answers, _ = handled(folder, {
        f"{name}, {strength}": {"image": data_uri(image), "strength": strength} | steps
        for name, image in (("red", RED), ("blue", BLUE)) for strength in (0.3, 1.0)} | {
        "both": {"image": red, "num_images": 2, "strength": 0.9} | steps,
        "second": {"image": red, "seed": 8, "strength": 0.9} | steps,
        "wide": {"image": data_uri(RED.resize((128, 64)))} | steps, "half": {"image": red, "mask_image": mask},
        "halves": {"image": red, "mask_image": mask, "num_images": 2},
        "address": {"image": "http://127.0.0.1:1/x.png"}, "broken": {"image": red[:100]},
        "mask alone": {"mask_image": mask},
        "none left": {"image": red, "num_inference_steps": 1},
        "small mask": {"image": red, "mask_image": data_uri(MASK.resize((32, 32)))},
    })
    second, wide, half = (pixels(answers[name])[0] for name in ("second", "wide", "half"))
    near, far = (np.abs(pixels(answers[f"red, {strength}"])[0] - pixels(answers[f"blue, {strength}"])[0]).mean()
                 for strength in (0.3, 1.0))
    assert near > far, "with more noise less is left of what was begun from"
    assert np.abs(pixels(answers["both"])[1] - second).max() <= 2
    start = np.asarray(RED, int)
    assert wide.shape[1] > wide.shape[0], "the picture's shape, and about the model's area"
    assert np.abs(pixels(answers["halves"])[0] - half).max() <= 2, "the same alone and in a batch"
    assert np.array_equal(half[:, :32], start[:, :32]) and not np.array_equal(half[:, 32:], start[:, 32:])
    assert "fetches nothing" in answers["address"]["error"] and "is a PNG that is cut off" in answers["broken"]["error"]
    assert answers["mask alone"]["error"].startswith("mask_image is given without image")
    assert answers["none left"]["error"].startswith("strength is 0.6 at 1 step(s), of which none is left")
    assert answers["small mask"]["error"].endswith("the mask should be of the picture's size.")


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["StableDiffusionXLPipeline", *(
    name for name, family in FAMILIES.items() if family.from_image and name in MINIATURES)])
def test_pictures_in_half_precision_leave_the_model_as_it_was(pipeline, tmp_path):
    folder = miniature(pipeline, tmp_path / "tiny") if pipeline in MINIATURES else tmp_path / "tiny"
    if pipeline not in MINIATURES:
        shutil.copytree(EMBEDDED, folder)
    config = folder / "vae" / "config.json"  # as SDXL's own VAE, which overflows in half precision
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": True}))
    few = {"num_inference_steps": 4}
    jobs = {"before": few, "image": {"image": data_uri(RED)} | few,
            "mask": {"image": data_uri(RED), "mask_image": data_uri(MASK)} | few, "after": few}
    answers, _ = handled(folder, jobs, SDWORKER_DTYPE="float16")
    before, *_, after = (pixels(answers[name])[0] for name in jobs)
    assert np.array_equal(before, after) and len(np.unique(before)) > 2


@pytest.mark.parametrize("pipeline", [
    pytest.param(name, marks=pytest.mark.slow)
    for name, family in FAMILIES.items() if family.edits])
def test_a_picture_is_edited(pipeline, tmp_path):
    folder = miniature(pipeline, tmp_path / "tiny")
    answers, log = handled(folder, {
        "red": {"image": data_uri(RED), "width": 64, "height": 48}, "none": {},
        "blue": {"image": data_uri(BLUE), "width": 64, "height": 48},
        "strength": {"image": data_uri(RED), "strength": 0.5},
        "mask": {"image": data_uri(RED), "mask_image": data_uri(MASK)},
        "mark": {"image": data_uri(RED), "prompt": "a <|image_pad|> star"},
        "unwanted": {"image": data_uri(RED), "width": 64, "height": 48, "negative_prompt": "blue"},
        "both": {"image": data_uri(RED), "width": 64, "height": 48, "num_images": 2}, "odd": {
            "image": data_uri(RED), "width": 50}, "sampler": {"image": data_uri(RED), "scheduler": "euler"},
        "second": {"image": data_uri(RED), "width": 64, "height": 48, "seed": 8},
        "unguided": {"image": data_uri(RED), "guidance_scale": 1.0, "negative_prompt": "blue"},
    }, SDWORKER_ATTENTION="sliced")
    (red,), (blue,) = pixels(answers["red"]), pixels(answers["blue"])
    both, (second,) = pixels(answers["both"]), pixels(answers["second"])
    assert answers["both"]["seeds"] == [7, 8] and np.abs(both[1] - second).max() <= 2 < np.abs(both[0] - second).max()
    assert "negative_prompt changes nothing" in " ".join(answers["unguided"]["warnings"])
    assert answers["odd"]["error"].startswith("width is 50") and answers["sampler"]["error"].startswith("scheduler is")
    assert "sliced not used: this model's layers cannot be sliced" in log
    assert red.shape == (48, 64, 3) and np.abs(red - blue).max() > 0, "it looks at the picture"
    assert np.abs(pixels(answers["unwanted"])[0] - red).max() > 0, "and at what is unwanted"
    assert answers["none"]["error"].startswith("image is missing")
    assert answers["strength"]["error"].startswith("strength is 0.5")
    assert "mask_image is of no use" in answers["mask"]["error"]
    assert len(pixels(answers["mark"])) == 1, "the sender's words are no second picture"


def test_a_class_that_diffusers_does_not_have_is_named(tmp_path):
    folder = miniature("PixArtSigmaPipeline", tmp_path / "tiny")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("PixArtSigmaPipeline", "NoSuchPipeline"))
    answers, _ = handled(folder, {"first": {}})
    assert "is a NoSuchPipeline, which diffusers" in answers["first"]["error"] and answers["first"]["refresh_worker"]


@pytest.mark.parametrize("pipeline", ["StableDiffusionXLInpaintPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_an_unknown_class_that_requires_a_picture_gets_one(pipeline, tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "tiny")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", pipeline))
    begun = {"image": data_uri(RED), "num_inference_steps": 4}
    masked = begun | {"mask_image": data_uri(MASK)}
    answers, _ = handled(folder, {"without": {}, "with": masked if "Inpaint" in pipeline else begun, "mask": masked})
    missing = "image and mask_image are missing" if "Inpaint" in pipeline else "image is missing"
    assert answers["without"]["error"].startswith(f"{missing}; ")
    assert pixels(answers["with"])[0].shape == (64, 64, 3)
    assert "which this worker does not know" in answers["with"]["warnings"][0]
    assert pixels(answers["mask"])[0].shape == (64, 64, 3), "by the class that diffusers has for it"


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_unet_for_inpainting_draws_with_a_picture_and_a_mask_alone(pipeline, tmp_path):
    """Under the plain class too, nine input channels are noise, picture and mask."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path / "tiny"
    miniature(pipeline, folder) if pipeline in MINIATURES else shutil.copytree(EMBEDDED, folder)
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()) | {
        "in_channels": 9}).save_pretrained(folder / "unet")
    begun = {"image": data_uri(RED), "num_inference_steps": 4}
    answers, _ = handled(folder, {"plain": {}, "image": begun, "both": begun | {"mask_image": data_uri(MASK)}},
                           before="from sdworker.start.load import initialize_model; initialize_model(warm=True)\n")
    assert answers["plain"]["error"].startswith("image and mask_image are missing; ")
    assert answers["image"]["error"].startswith("mask_image is missing; ")
    assert np.array_equal(pixels(answers["both"])[0][:, :32], np.asarray(RED, int)[:, :32])


def test_a_unet_that_was_made_for_another_class_is_refused_in_a_sentence(tmp_path):
    """InstructPix2Pix under the plain class: its eight input channels are noise and a picture."""
    from diffusers import UNet2DConditionModel

    folder = miniature("StableDiffusionPipeline", tmp_path / "tiny")
    UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()) | {
        "in_channels": 8}).save_pretrained(folder / "unet")
    answers, _ = handled(folder, {"plain": {}, "image": {"image": data_uri(RED), "num_inference_steps": 4}})
    for answer in answers.values():
        assert answer["code"] == "model_error" and "made for editing a picture by an instruction" in answer["error"]


def test_a_model_without_a_component_draws_or_names_it(tmp_path):
    def without(pipeline: str, *names: str) -> Path:
        folder = miniature(pipeline, tmp_path / "-".join((pipeline, *names)))
        index = json.loads((folder / "model_index.json").read_text()) | {name: [None, None] for name in names}
        (folder / "model_index.json").write_text(json.dumps(index))
        for name in names:
            shutil.rmtree(folder / name)
        return folder
    answers, _ = handled(without("StableDiffusion3Pipeline", "text_encoder_3", "tokenizer_3"), {
        "plain": {}, "image": {"image": data_uri(RED), "num_inference_steps": 4}})
    assert all(pixels(answer)[0].shape == (64, 64, 3) for answer in answers.values())
    for pipeline, name in (("FluxPipeline", "text_encoder_2"), ("StableDiffusionPipeline", "unet"),
                           ("PixArtSigmaPipeline", "scheduler")):
        answers, _ = handled(without(pipeline, name), {"first": {}})
        assert f"{name} is null in " in answers["first"]["error"] and "cannot draw without" in answers["first"]["error"]


def test_kontext_draws_the_size_that_is_asked_for(tmp_path):
    """Its call scales any size to a megapixel unless it is given the area."""
    from diffusers import AutoencoderKL

    folder = miniature("FluxPipeline", tmp_path / "tiny")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "FluxKontextPipeline"))
    config = json.loads((folder / "vae" / "config.json").read_text())  # with eight pixels to a latent, as FLUX.1's
    AutoencoderKL.from_config(config | {
        "block_out_channels": [8] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4}).save_pretrained(folder / "vae")
    answers, _ = handled(folder, {
        "sized": {"image": data_uri(RED), "width": 64, "height": 48}, "alone": {"width": 96, "height": 32},
        "large": {"image": data_uri(RED), "width": 1024, "height": 48}}, SDWORKER_MAX_SIZE_PX="512")
    assert pixels(answers["sized"])[0].shape == (48, 64, 3) and pixels(answers["alone"])[0].shape == (32, 96, 3)
    assert answers["large"]["error"].startswith("width is 1024: should be from")


def test_the_native_side_is_read_from_two_numbers_or_from_the_table(tmp_path):
    folder = miniature("StableDiffusionPipeline", tmp_path / "tiny")
    config = folder / "unet" / "config.json"
    for size, side in (([24, 32], 56), (None, 64)):  # 64: in sdworker.json, as the denoiser says nothing
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size}))
        answers, _ = handled(folder, {"first": {}}, SDWORKER_PROFILE="lowmem")
        assert pixels(answers["first"])[0].shape == (side, side, 3)


def test_a_checkpoint_in_one_file_is_refused_with_the_command_and_draws_when_converted(tmp_path):
    folder = miniature("StableDiffusionPipeline", tmp_path / "tiny")
    file = single_file(folder, tmp_path / "some.safetensors")
    bake_file(str(file), tmp_path / "converted", config=str(folder))
    explicit = {"explicit": {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 3.0}}
    (theirs,), (ours,) = (pixels(handled(model, explicit)[0]["explicit"]) for model in (folder, tmp_path / "converted"))
    assert np.array_equal(theirs, ours)
    for model in (file, tmp_path):
        answers, log = handled(model, {"first": {}})
        assert "some.safetensors --to DIR`" in answers["first"]["error"]
        assert f"convert it with `sdworker bake {file} --to DIR`" in log, "the answer names no folder above the last"
    file.rename(pickled := tmp_path / "some.ckpt")
    for model, kind in ((pickled, "a pickle"), (tmp_path, "a pickle"), ("/x.gguf", "a GGUF file"),
                        ("some.zip", "an archive")):
        with pytest.raises(ModelError, match=f"is {kind}, .*; choose the model as a folder"):
            locate(Settings(model=str(model)))


MADE_UP = """
from dataclasses import replace
import diffusers
from sdworker.core.families import FAMILIES
diffusers.MadeUpPipeline = type("MadeUpPipeline", (diffusers.FluxPipeline,), {})
FAMILIES["MadeUpPipeline"] = replace(FAMILIES["FluxPipeline"], name="Made up")
"""


def test_a_family_is_its_row_and_not_its_name(tmp_path):
    """FLUX.1-schnell reads 256 tokens; under another name, with the same row, it draws the same pictures."""
    from diffusers import FluxTransformer2DModel

    folder = miniature("FluxPipeline", tmp_path / "tiny")
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {"guidance_embeds": False}
    torch.manual_seed(0)
    FluxTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    jobs = {"plain": {}, "image": {"image": data_uri(RED), "num_inference_steps": 4},
            "sampler": {"scheduler": "euler"}}
    known, _ = handled(folder, jobs)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "MadeUpPipeline"))
    made_up, _ = handled(folder, jobs, before=MADE_UP)
    for name in ("plain", "image"):
        assert np.array_equal(pixels(made_up[name])[0], pixels(known[name])[0])
    assert made_up["sampler"]["error"] == known["sampler"]["error"]


def test_a_new_family_does_not_compile_unless_its_row_has_it():
    assert not Family("new", "", "", parameters=1.0, steps=30, guidance=5.0).compiles


def test_only_the_tables_name_a_family():
    """Modules of the worker read a family's row; none compares the names of pipelines, or parts of them."""
    package, tables = Path(sdworker.__file__).parent, ("core/families.py", "aot/modules.py")
    names = {"XL", "Edit", "Flux", "Qwen", "ZImage", "true_cfg_scale"} | {
        name for pipeline, family in FAMILIES.items() for name in (pipeline, family.from_image, family.inpaint) if name}
    used = {(path.name, node.value) for chapter in ("core", "engine", "aot", "start", "serve")
            for path in (package / chapter).glob("*.py") if str(path.relative_to(package)) not in tables
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names}
    assert used == set()
