"""LoRAs by request: by the field `loras` and by tags in prompts, each picture with its own, and nothing left behind."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from handled import handled, pixels
from PIL import Image
from safetensors.torch import save_file

from sdworker.aot.engine import unsupported_reason
from sdworker.aot.selection import unsupported_by_aot
from sdworker.build.bake import bake
from sdworker.build.hub_download import sha256_of
from sdworker.build.manifest import read_manifest, set_writable, write_manifest
from sdworker.core.model_info import EMBEDDED, Unsuited, read_model_info
from sdworker.core.settings import Settings
from sdworker.embedded.tiny_models import miniature, with_refiner
from sdworker.engine.build_pipeline import build_pipeline, defaults
from sdworker.engine.generate import generate
from sdworker.engine.lora_refiner import fuse_loras
from sdworker.engine.pipeline import FamilyEngine
from sdworker.engine.torch_compile import compile_denoiser
from sdworker.engine.types import Request, prepare
from sdworker.serve.request import RequestError, parse_request, request_schema

PROMPT = "a large red star on a blue background"
LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
STYLE = {f"{LAYER}.lora_A.weight": torch.full((1, 96), 2.0), f"{LAYER}.lora_B.weight": torch.ones(96, 1)}
WORDS = {f"lora_te{encoder}_text_model_encoder_layers_0_self_attn_{layer}_proj.{name}": torch.ones(shape)
         for encoder in (1, 2) for layer in ("q", "out")  # of both text encoders
         for name, shape in (("lora_down.weight", (1, 64)), ("lora_up.weight", (64, 1)), ("alpha", ()))}
LORAS = {"style": STYLE, "words.v2": WORDS}


def with_loras(folder: Path, loras: dict[str, dict[str, torch.Tensor]] = LORAS) -> Path:
    """A model's folder, with LoRAs as they would be baked; the embedded model if it does not exist."""
    if not folder.exists():
        shutil.copytree(EMBEDDED, folder)
    (folder / "loras").mkdir()
    for name, tensors in loras.items():
        save_file(tensors, folder / "loras" / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return read_model_info(with_loras(tmp_path_factory.mktemp("baked") / "styled"))


def drawn(engine, loras=None, **fields) -> bytes:
    fields = {"prompt": PROMPT, "seed": 7, "steps": 4} | fields
    return generate(engine, loras=loras, **fields).pictures[0].image.tobytes()


def test_a_worker_draws_each_request_with_its_loras_and_leaves_nothing_behind(model):
    plain, weighted = {"prompt": PROMPT, "num_inference_steps": 4}, {"prompt_syntax": "weighted"}
    secret = "zanzibar"  # a word of a prompt, in a tag
    answers, log = handled(model.folder, {
        "all": plain, "none": plain | {"loras": {}}, "zero": plain | {"loras": {"style": 0}},
        "style": plain | {"loras": {"style": 0.8}}, "words": plain | {"loras": {"words.v2": -0.5}},
        "again": plain | {"metadata": True}, "half": plain | {"loras": {"style": 0.5, "words.v2": 0.5}},
        "tag": plain | weighted | {"prompt": f"{PROMPT}<lora:style:0.8>", "metadata": True},
        "both": plain | weighted | {"prompt": f"<lora:style:0.8>{PROMPT}", "loras": {"style": 0.1, "words.v2": -0.5}},
        "field": plain | {"loras": {"style": 0.8, "words.v2": -0.5}},
        "each": plain | weighted | {"prompt": [f"{PROMPT}<lora:style:0.8>", PROMPT, f"{PROMPT}<lora:words.v2:-0.5>"],
                                    "seed": [7, 7, 7]},
        "letters": plain | {"prompt": f"{PROMPT} <lora:style:0.8>"},
        "unknown tag": plain | weighted | {"prompt": f"{PROMPT}<lora:{secret}>"},
        "negative": plain | weighted | {"negative_prompt": "<lora:style>"},
        "unknown": plain | {"loras": {"stile": 0.8}}, "large": plain | {"loras": {"style": 2.5}},
        "last": plain}, SDWORKER_LORA_SCALE="0.5")
    without, _ = handled("embedded", {"none": plain})
    pictures = {name: pixels(answer) for name, answer in answers.items() if "images" in answer}
    first = {name: one[0].tobytes() for name, one in pictures.items()}
    assert first["none"] == first["zero"] == pixels(without["none"])[0].tobytes(), "off is as without, to the bit"
    assert len({first[name] for name in ("all", "none", "style", "words", "field")}) == 5, "each of these differs"
    assert first["all"] == first["again"] == first["half"] == first["last"] == first["unknown tag"]
    assert first["style"] == first["tag"] and first["both"] == first["field"], "the tag counts, the other one stays"
    assert [one.tobytes() for one in pictures["each"]] == [first["style"], first["all"], first["words"]]
    for name, part in (("letters", "prompt has a tag <lora:...>, which was not applied; name the LoRA in the field"),
                       ("unknown tag", "which was not applied; known are style, words.v2, with weights from -2 to 2."),
                       ("negative", "negative_prompt has a tag <lora:...>, which was not applied; name the LoRA in")):
        assert part in " ".join(answers[name]["warnings"]), answers[name]["warnings"]
    assert not any(answers[name]["warnings"] for name in ("all", "none", "style", "tag", "both", "each"))
    assert answers["unknown"]["error"].endswith("has style, words.v2; did you mean style?")
    assert {(answers[name]["code"], answers[name]["field"]) for name in ("unknown", "large")} == {
        ("invalid_request", "loras")}
    assert secret not in log and "red star" not in log
    notes = [file_text(answers[name]["images"][0]) for name in ("again", "tag")]
    assert 'LoRAs: "style: 0.5, words.v2: 0.5"' in notes[0] and 'LoRAs: "style: 0.8"' in notes[1]


def file_text(uri: str) -> str:
    """What a picture's file says that it was drawn from."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).text["parameters"]


def test_a_lora_of_text_encoders_alone_is_switched_off_to_the_bit(tmp_path):
    engine = build_pipeline(defaults(), read_model_info(with_loras(tmp_path / "model", {"words": WORDS})))
    plain = drawn(FamilyEngine(read_model_info(EMBEDDED)))
    words = drawn(engine)
    assert words != plain == drawn(engine, {}) and words == drawn(engine, {"words": 1}), "and on again"


@pytest.mark.parametrize("switch", [{"quantize": "int8"}, {"step_cache": 2}], ids=lambda switch: next(iter(switch)))
def test_a_switch_of_the_pipeline_leaves_loras_as_they_are_asked_for(model, switch):
    engine, plain = (build_pipeline(defaults(**switch), one) for one in (model, read_model_info(EMBEDDED)))
    everything, style = drawn(engine), drawn(engine, {"style": 0.8})
    assert engine.warnings == [] and drawn(engine, {}) == drawn(plain)
    assert (drawn(engine), drawn(engine, {"style": 0.8})) == (everything, style) and everything != style


def test_a_refiner_reads_the_prompt_with_the_loras_of_the_request(tmp_path):
    engine = build_pipeline(defaults(), read_model_info(with_loras(with_refiner(tmp_path / "model"))))
    plain = build_pipeline(defaults(), read_model_info(with_refiner(tmp_path / "plain")))
    fields = {"steps": 10, "refiner_start": 0.8}
    assert drawn(engine, {}, **fields) == drawn(plain, **fields) != drawn(engine, {"words.v2": 0.5}, **fields)
    assert drawn(engine, {}, **fields) == drawn(plain, **fields)


def test_pictures_and_other_families_are_drawn_with_the_loras_of_the_request(model, tmp_path):
    folder = miniature("FluxPipeline", tmp_path / "flux")
    width = json.loads((folder / "transformer" / "config.json").read_text())
    width = width["num_attention_heads"] * width["attention_head_dim"]
    names = (f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight" for part in "AB")
    loras = {"style": dict(zip(names, (torch.ones(1, width), torch.ones(width, 1)), strict=True))}
    plain = FamilyEngine(read_model_info(folder))
    expected = drawn(plain)
    engine = build_pipeline(defaults(), read_model_info(with_loras(folder, loras)))
    assert drawn(engine) != expected == drawn(engine, {}) == drawn(engine, {"style": 0})
    tagged = generate(engine, f"{PROMPT}<lora:style>", prompt_syntax="weighted", seed=7, steps=1)
    assert any("name the LoRA in the field loras, which takes style." in warning for warning in tagged.warnings)
    sdxl, picture = build_pipeline(defaults(), model), {"image": Image.new("RGB", (64, 64), "red")}
    assert drawn(sdxl, {}, **picture) == drawn(FamilyEngine(read_model_info(EMBEDDED)), **picture)
    assert drawn(sdxl, {}, **picture) != drawn(sdxl, {"style": 0.8}, **picture)


def test_a_cuda_graph_is_replayed_only_with_the_loras_that_it_was_recorded_with(model):
    engine = build_pipeline(defaults(), model)
    unet, recorded = engine.pipe.unet, []
    wanted = [None, {}, {"style": 0.8}, {"style": -1.0}, None, {}]
    expected = [drawn(engine, loras) for loras in wanted]

    def record(call, pool=None):
        """What a CUDA graph does, on a processor: the weights of its LoRAs are fixed."""
        loras, output = unet.loras, call()[0]
        recorded.append(loras)

        def replay():
            assert unet.loras == loras
            output.copy_(call()[0])
        return replay, (output,)
    compile_denoiser(unet, "cuda-graph")
    unet.forward.record = record
    assert [drawn(engine, loras) for loras in wanted] == expected
    assert len(recorded) == len(set(recorded)) == 4, "one for each set of weights"


def test_an_engine_without_its_add_ons_refuses_loras(model):
    with pytest.raises(Unsuited, match=re.escape("loras is {'style': 1.0}, which has no effect")):
        generate(FamilyEngine(model), PROMPT, loras={"style": 1.0}, steps=1)
    assert "which sdworker bake --fuse-loras would make a part of the weights" in unsupported_by_aot(defaults(), model)
    ranges = {"side": [64, 128, 8], "images": [1, 4], "steps": [1, 20]}
    aot = SimpleNamespace(model=model, about={"key": {"ranges": ranges}}, tables={"own rows"})
    params, specs = prepare(Request(prompt=PROMPT, loras={}), model)
    params = replace(params, refiner_start=1.0)
    assert unsupported_reason(aot, params, specs) == "loras is {}, and the AOT engine does not draw with that"


def test_fused_loras_and_missing_ones_are_named_with_a_remedy(tmp_path, model):
    bake("embedded", folder := tmp_path / "fused")
    set_writable(folder, True)
    with_loras(folder, {"style": STYLE})
    path, manifest = folder / "loras" / "style.safetensors", read_manifest(folder)
    entry = {"file": "loras/style.safetensors", "bytes": path.stat().st_size, "sha256": sha256_of(path),
             "repository": "owner/style", "revision": "0" * 40, "license": None}
    write_manifest(folder, manifest | {"files": [*manifest["files"], entry]})
    fuse_loras(folder, 0.8)
    fused, settings = read_model_info(folder), Settings()
    for loras in ({}, {"style": 0.8}):
        with pytest.raises(RequestError, match=r"are fused into its weights, at scale 0\.8, and act in every") as error:
            parse_request({"prompt": "x", "loras": loras}, fused, settings)
        assert error.value.field == "loras"
    with pytest.raises(RequestError, match="loras names 'style', and no LoRA is baked with model"):
        parse_request({"prompt": "x", "loras": {"style": 1}}, read_model_info(EMBEDDED), settings)
    assert parse_request({"prompt": "x", "loras": {}}, read_model_info(EMBEDDED), settings).loras == {}
    names = request_schema(model, settings)["properties"]["loras"]
    assert list(names["properties"]) == ["style", "words.v2"] and not names["additionalProperties"]


def test_the_command_line_names_loras(model, tmp_path):
    command = [sys.executable, "-m", "sdworker.cli.main", "generate", PROMPT, "--steps", "4", "--seed", "7", "--json",
               "--lora", "style=0.8", "--lora", "words.v2", "--out", tmp_path]
    environment = os.environ | {"SDWORKER_MODEL": str(model.folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(json.loads(done.stdout)["images"][0]["path"])).tobytes()
    engine = build_pipeline(defaults(), model)
    assert picture == drawn(engine, {"style": 0.8, "words.v2": 1.0}) != drawn(engine)
