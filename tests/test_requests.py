"""What clients of other workers send, and what nobody should: each is drawn, or refused in a sentence."""

import base64
import inspect
import io
import json
import os
from collections import Counter
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import httpx
import jsonschema
import numpy as np
import openai
import pytest
import torch
from handled import drawn_by, handled, pixels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import sdworker.start.load
from sdworker.core.model_info import ModelError, read_model_info
from sdworker.core.settings import get_settings
from sdworker.embedded.tiny_models import with_refiner
from sdworker.engine.build_pipeline import build_pipeline, defaults
from sdworker.engine.diffusers_pipeline import denoise
from sdworker.engine.generate import generate
from sdworker.serve.answer import answer_job, failure
from sdworker.serve.delivery import INLINE_BYTES
from sdworker.serve.handler import _queue_options, handler
from sdworker.serve.image_input import RequestError, read_mask, read_picture
from sdworker.serve.image_io import data_uri, from_data_uri
from sdworker.serve.request import JobRequest, parse_request, request_schema
from sdworker.serve.sdk import JobGate

# The request of https://github.com/runpod-workers/worker-sdxl#example-request, unchanged.
README_OF_WORKER_SDXL = json.loads("""{
  "input": {
    "prompt": "A majestic steampunk dragon soaring through a cloudy sky, intricate clockwork details, golden hour lighting, highly detailed",
    "negative_prompt": "blurry, low quality, deformed, ugly, text, watermark, signature",
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 25,
    "refiner_inference_steps": 50,
    "guidance_scale": 7.5,
    "strength": 0.3,
    "high_noise_frac": 0.8,
    "seed": 42,
    "scheduler": "K_EULER",
    "num_images": 1
  }
}""")  # noqa: E501


def noise(spec, params) -> Image.Image:
    "Noise of the size that was asked for."
    pixels = np.random.default_rng(spec.seed).integers(0, 255, (params.height, params.width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def drawn_at_once():
    with drawn_by(noise):
        yield


def test_the_readme_of_worker_sdxl_is_answered_with_what_its_client_reads(monkeypatch, drawn_at_once):
    monkeypatch.setenv("SDWORKER_DIALECT", "worker-sdxl")
    get_settings.cache_clear()
    try:
        answer = handler({"id": "readme"} | README_OF_WORKER_SDXL)
    finally:
        monkeypatch.undo()
        get_settings.cache_clear()
    assert answer["image_url"] == answer["images"][0] and answer["seed"] == 42
    assert from_data_uri(answer["image_url"]).size == (1024, 1024)
    named = [warning.partition(" ")[0] for warning in answer["warnings"]]
    assert named[:3] == ["strength", "refiner_inference_steps", "high_noise_frac"]


# Numbers are those of worker-sdxl's defects; 7, 8 and 10 have tests of their own below.
DEFECTS = {  # a request that worker-sdxl answers wrongly -> the field that is at fault here, empty: it is drawn
    "1: more images than allowed": ({"num_images": 300}, "num_images"),
    "1: more steps than allowed": ({"num_inference_steps": 500}, "num_inference_steps"),
    "1: larger than allowed": ({"width": 4096, "height": 4096}, "width"),
    "1: guidance beyond its range": ({"guidance_scale": 50}, "guidance_scale"),
    "1: a format that does not exist": ({"image_format": "psd"}, "image_format"),
    "2: no prompt": ({"prompt": None}, "prompt"),
    "4: a local path": ({"image_url": "/etc/passwd"}, "image_url"),
    "4: a private address": ({"image_url": "http://169.254.169.254/latest/meta-data/"}, "image_url"),
    "5: a scheduler that does not exist": ({"scheduler": "K_LMAO"}, "scheduler"),
    "5: a size that is no multiple of 8": ({"width": 1001}, "width"),
    "6: no step left of the refinement": ({"image_url": data_uri(Image.new("RGB", (64, 64))), "strength": 0.3,
                                           "num_inference_steps": 2}, "strength"),
    "two names of one field": ({"num_inference_steps": 3, "steps": 4}, "steps"),
    "7: no refiner": ({"refiner_inference_steps": 0}, ""), "9: not square": ({"width": 128, "height": 192}, ""),
    "3, 9: several images": ({"num_images": 2}, ""),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_worker_sdxl_gets_wrong_is_drawn_or_refused_by_name(defect, drawn_at_once):
    fields, at_fault = DEFECTS[defect]
    answer = handler({"id": "defect", "input": {"prompt": "a star"} | fields})
    assert isinstance(answer.get("error", ""), str) and "refresh_worker" not in answer
    if at_fault:
        assert (answer["field"], answer["code"]) == (at_fault, "invalid_request") and at_fault in answer["error"]
    else:
        assert "image_url" not in answer and len(set(answer["images"])) == len(answer["images"]), "each image once"


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    return with_refiner(tmp_path_factory.mktemp("baked") / "model")


def test_defect_7_high_noise_frac_divides_the_steps_between_base_and_refiner(refined):
    job = {"prompt": "a red star", "seed": 7, "num_inference_steps": 10, "scheduler": "euler"}
    theirs = job | {"scheduler": "K_EULER", "refiner_inference_steps": 50}
    answers, _ = handled(refined, {
        "half": theirs | {"high_noise_frac": 0.5}, "most": theirs | {"high_noise_frac": 0.8},
        "native": job | {"refiner_start": 0.5}, "base": job | {"refiner_start": 1.0},
    }, SDWORKER_DIALECT="auto")
    half, most, native, base = (pixels(answers[name])[0] for name in ("half", "most", "native", "base"))
    assert np.array_equal(half, native) and not np.array_equal(half, most) and not np.array_equal(half, base)
    (warning,) = answers["half"]["warnings"]
    assert warning.startswith("refiner_inference_steps changes nothing: the refiner draws the last")


def test_defects_7_and_8_the_refiner_goes_on_where_the_base_ended_and_shares_its_components(refined):
    """It gets the negative prompt and the guidance too; VAE and second text encoder are in memory once."""
    engine = build_pipeline(defaults(), read_model_info(refined))
    base, refiner = engine.pipe, engine.refine.pipe
    assert refiner.vae is base.vae and refiner.text_encoder_2 is base.text_encoder_2
    assert refiner.text_encoder is None and refiner.unet is not base.unet
    with patch("sdworker.engine.lora_refiner.denoise", wraps=denoise) as calls:
        for negative in ("", "green"):
            generate(engine, "a red star", seed=7, steps=10, refiner_start=0.5, guidance=5.0, negative_prompt=negative)
    first, plain, _, unwanted = calls.call_args_list
    assert [call.args[0] for call in (first, plain)] == [base, refiner]
    assert first.kwargs["denoising_end"] == plain.kwargs["denoising_start"] == 0.5
    assert unwanted.args[3].guidance == 5.0
    (before, after), (same, still) = ([call.args[1][name] for call in (plain, unwanted)] for name in (
        "negative_prompt_embeds", "prompt_embeds"))
    assert not torch.equal(before, after) and torch.equal(same, still), "the negative prompt alone has changed"


def test_defect_10_an_answer_is_one_value_and_no_stream():
    """The SDK posts each value of a generator to the stream, whose chunks are smaller than a picture."""
    for handle in (_queue_options(JobGate(1))["handler"], answer_job):
        assert inspect.iscoroutinefunction(handle) and not inspect.isasyncgenfunction(handle)


@pytest.fixture
def client():
    "OpenAI's client, whose requests reach the handler as RunPod's queue passes them on."
    def proxy(request: httpx.Request) -> httpx.Response:
        route = request.url.path.removeprefix("/v2/endpoint/openai")
        payload = {"openai_route": route, "openai_input": json.loads(request.content)}
        answer = handler({"id": "openai", "input": payload})
        return httpx.Response(400 if "error" in answer else 200, json=answer)

    with openai.OpenAI(api_key="none", base_url="https://api.runpod.example/v2/endpoint/openai/v1", max_retries=0,
                       http_client=httpx.Client(transport=httpx.MockTransport(proxy))) as client:
        yield client


def test_openais_client_gets_pictures(client):
    answer = client.images.generate(
        model="embedded", prompt="a large red star on a blue background", n=2, size="64x48", output_format="jpeg",
        extra_body={"seed": 7, "num_inference_steps": 2})
    assert answer.created > 0 and len(answer.data) == 2 and answer.seeds == [7, 8]
    assert answer.warnings[0].startswith("The size")
    for one in answer.data:
        image = Image.open(io.BytesIO(base64.b64decode(one.b64_json)))
        assert (image.format, image.size) == ("JPEG", (64, 48))


def test_an_edit_redraws_the_transparent_part(client):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    mask = photo.convert("RGBA")
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    body = {"prompt": "a star", "image": [data_uri(photo)], "mask": data_uri(mask), "num_inference_steps": 2, "seed": 7}
    answer = handler({"id": "edit", "input": {"openai_route": "/v1/images/edits", "openai_input": body}})
    drawn = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    left, right = (np.abs(np.asarray(drawn, int) - np.asarray(photo))[:, part].mean() for part in (
        slice(0, 24), slice(40, 64)))
    assert left < right
    body["image"] = [None]
    refused = handler({"id": "edit", "input": {"openai_route": "/v1/images/edits", "openai_input": body}})
    assert refused["field"] == "image"


def test_openais_client_learns_what_is_wrong(client):
    for wrong in ({"size": "65x65"}, {"n": 99}, {"response_format": "url"}, {"extra_body": {"bogus": 1}}):
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.generate(prompt="x", **wrong)
        assert raised.value.body or "invalid_request" in raised.value.response.text


SENTENCES = {  # a request -> how its refusal begins
    "a typing error in the only field": ({"promt": "x"}, "promt is not known here; did you mean prompt?"),
    "a typing error beside others": ({"prompts": ["x"], "seed": "x"}, "prompts is not known here; did you mean"),
    "an alias with a typing error": ({"prompt": "x", "cfg-scale": 7}, "cfg-scale is not known here; did you mean cfg_"),
    "a field of worker-sdxl": ({"prompt": "x", "image_ur": "x"}, "image_ur is not known here; did you mean image_url"),
    "nothing is near": ({"prompt": "x", "init_image": "x"}, "init_image is not known here; remove it."),
    "a line end in a name": ({"prompt": "x", "a\nb": 1}, r"'a\nb' is not known here"),
    "a line end beside the envelope": ({"openai_route": "/v1/images/generations", "openai_input": {"prompt": "x"},
                                        "a\nINFO:sdworker:job y": 1}, r"'a\nINFO:sdworker:job y' is beside "),
    "half a surrogate pair in a name": ({"openai_input": {"prompt": "x"}, "\ud800": 1}, r"'\ud800' is beside"),
    "hundreds of digits": ({"prompt": "x", "width": 10**400}, "width is 1000000000: should be from 8 to 1536."),
    "an unknown field beside a wrong one": ({"prompt": "x", "size": "large", "bogus": 1}, "bogus is not known here"),
    "no name": ({"prompt": "x", "": 1}, "'' is not known here"),
    "a route": ({"openai_route": "/v1/images/edits/", "openai_input": {"prompt": "x"}},
                "openai_route should be /v1/images/generations or /v1/images/edits."),
    "millions of seeds": ({"prompt": "x", "seed": [1] * 10**6}, "seed is [1, 1, 1"),
    "size beside 0": ({"prompt": "x", "size": "64x64", "width": 0}, "size is given beside width"),
    "a sender's names": ({"prompt": "x", "size": "64x64", "aspect_ratio": "1:1"}, "size is given beside aspect_ratio"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_refusal_names_what_the_sender_wrote(name, caplog):
    payload, beginning = SENTENCES[name]
    answer = handler({"id": "refused", "input": payload})
    assert answer["error"].startswith(beginning) and len(answer["error"]) < 200 and answer["code"] == "invalid_request"
    assert answer["field"].isprintable() and not [r for r in caplog.records if "\n" in r.getMessage()]


def test_what_forms_and_other_programs_send_is_taken(drawn_at_once):
    empty = dict.fromkeys(("width", "seed", "guidance_scale", "delivery", "prompt_syntax", "scheduler", "loras"), "")
    words = {"prompt_syntax": "Weighted", "delivery": "Auto", "image_format": "image/JPEG"}
    png = {"output_format": "png", "output_quality": 80}  # Cog's own defaults
    empty |= dict.fromkeys(("size", "n", "quality", "batch_size", "response_format", "high_noise_frac"), " ")
    assert handler({"id": "form", "input": {"prompt": "x", "num_images": 1} | empty})["warnings"] == []
    for fields in (empty, words, words | {"image_format": ".png"}, png, {"output_quality": 0, "output_format": "jpg"}):
        assert handler({"id": "form", "input": {"prompt": "x"} | fields}).get("images"), fields
    warnings = handler({"id": "png", "input": {"prompt": "x"} | png})["warnings"]
    assert warnings == ["output_quality changes nothing: a png loses nothing; ask for jpeg or webp."]
    for body in ({"quality": "hd"}, {"model": "dall-e-3"}, {"n": 1, "style": "", "quality": "", "background": ""}):
        answer = handler({"id": "openai", "input": {"prompt": "x"} | body})
        assert answer["data"] and len(answer["warnings"]) == ("n" not in body)


@pytest.mark.parametrize("folder", ["models", "my models"])
def test_no_folder_of_the_machine_is_in_an_answer(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SDWORKER_MODEL", str(tmp_path / folder / "mine"))
    get_settings.cache_clear()
    try:
        path = tmp_path / folder / "mine" / "unet" / "config.json"
        answer = failure(ModelError(f"{path} is missing; the folder must hold a complete diffusers pipeline."))
    finally:
        monkeypatch.undo()
        get_settings.cache_clear()
    assert answer["error"].split(" is missing")[0].endswith("unet/config.json")
    assert str(tmp_path) not in answer["error"] and tmp_path.name not in answer["error"]
    answer = failure(ModelError(f"{path} is missing."))  # of another model
    assert str(tmp_path) not in answer["error"]


def test_the_schema_says_what_is_taken_and_refused():
    schema = request_schema(sdworker.start.load.model_info(), get_settings())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    known = {"type", "description", "enum", "minimum", "maximum", "exclusiveMinimum", "multipleOf", "items", "default",
             "examples", "maxLength", "properties", "additionalProperties"}
    assert all(entry.keys() <= known for entry in schema["properties"].values())
    for fields in ({}, dict.fromkeys(schema["properties"]), {"seed": [1, -1, None]}, {"prompt": ["a", "b"]},
                   {"width": 64.0, "num_inference_steps": 20, "image_format": "webp", "image_quality": 90}):
        assert validator.is_valid({"prompt": "x"} | {name: fields[name] for name in fields if fields[name]} | {
            name: None for name in fields if name != "prompt" and fields[name] is None}), fields
    for wrong in ({"clip_skip": -1}, {"clip_skip": 3}, {"image_quality": 101}, {"width": 65}, {"num_images": 0},
                  {"seed": 2**64}, {"image_format": "gif"}, {"promt": "x"}, {"loras": {"style": 1}}, {"prompt": 5}):
        assert not validator.is_valid({"prompt": "x"} | wrong), wrong
        with pytest.raises(RequestError):
            parse_request({"prompt": "x"} | wrong, sdworker.start.load.model_info(), get_settings())


KEYS = sorted({field.alias or name for name, field in JobRequest.model_fields.items()} | {
    "steps", "n", "size", "image_url", "high_noise_frac", "openai_route", "openai_input", "response_format", "model"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["a star", "euler", "png", "64x64", "16:9", "auto", 64, 1, 7, 0.5, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4), max_leaves=8)
LIKELY = {"prompt": st.just("a star"), "width": st.sampled_from([64, 96.0, None]), "num_inference_steps": st.just(1)}
GOOD = {"seed": st.integers(-1, 2**64 - 1) | st.none(), "num_images": st.integers(1, 3), "scheduler": st.sampled_from(
    ["euler", "KLMS", "", None]), "output_format": st.sampled_from(["jpg", "PNG", "webp", None]), "strength": st.none(),
    "negative_prompt": st.text(max_size=20), "guidance": st.floats(0, 30), "refiner_inference_steps": st.integers()}
REQUESTS = JSON | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5) | st.fixed_dictionaries(
    LIKELY, optional=GOOD) | st.fixed_dictionaries(LIKELY, optional={k: JSON for k in KEYS if k not in LIKELY})


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(payload=REQUESTS)
def check_payload(payload, outcomes):
    answer = handler({"id": "any", "input": payload})
    json.dumps(answer)
    assert "refresh_worker" not in answer
    if "error" in answer:
        assert answer["code"] == "invalid_request" and isinstance(answer["field"], str), (payload, answer)
        assert answer["error"].endswith(("." , "?")) and "\n" not in answer["error"], answer
    else:
        assert answer.get("images") or answer["data"]
    outcomes["refused" if "error" in answer else "drawn"] += 1


def test_no_input_stops_the_worker(drawn_at_once):
    before, outcomes = (dict(os.environ), get_settings(), sdworker.start.load.model_info()), Counter()
    check_payload(outcomes=outcomes)
    assert before == (dict(os.environ), get_settings(), sdworker.start.load.model_info())
    assert outcomes["refused"] > 100 and outcomes["drawn"] > 100, outcomes


def seeds_of_pictures() -> list[bytes]:
    files, noise = [], np.random.default_rng(0).integers(0, 255, (24, 24, 4), np.uint8)
    for image_format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        for image in (Image.fromarray(noise), Image.fromarray(noise).convert("LA")):
            buffer = io.BytesIO()
            (image.convert("RGB") if image_format in ("JPEG", "BMP") else image).save(
                buffer, image_format, **{"progressive": image.mode == "LA"} if image_format == "JPEG" else {})
            files.append(buffer.getvalue())
    return files


SQUARE = Image.new("RGB", (24, 24))


@settings(max_examples=1000, deadline=None)
@given(data=st.data(), original=st.sampled_from(seeds_of_pictures()))
def check_bytes(data, original, outcomes):
    content = bytearray(original)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[:data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    text, alpha_is_mask = base64.b64encode(content).decode(), data.draw(st.booleans())
    for read in (partial(read_picture, text, "image"), partial(read_mask, text, "image", SQUARE)):
        try:
            result = read(alpha_is_mask=alpha_is_mask)
        except RequestError as error:
            assert str(error).startswith("image ") and str(error).endswith(".") and "\n" not in str(error)
        else:
            assert isinstance(result, tuple | Image.Image)
    if data.draw(st.integers(0, 3)) == 0:  # for a part of them, all the way to an answer
        name = data.draw(st.sampled_from(["image", "mask" if alpha_is_mask else "mask_image"]))
        body = {"prompt": "a star", "image": data_uri(SQUARE)} | {name: text}
        answer = handler({"id": "bytes", "input": {
            "openai_route": "/v1/images/edits", "openai_input": body} if alpha_is_mask else body})
        assert "refresh_worker" not in answer
        assert answer.get("images") or answer.get("data") or (answer["code"], answer["field"]) == (
            "invalid_request", name), answer
        outcomes["refused" if "error" in answer else "drawn"] += 1


def test_no_bytes_are_more_than_a_picture_or_a_sentence(drawn_at_once):
    outcomes = Counter()
    check_bytes(outcomes=outcomes)
    assert outcomes["refused"] and outcomes["drawn"], outcomes


def photo_like(seed: int) -> Image.Image:
    "A gradient with grain, which JPEG compresses much better than PNG, as with photographs."
    smooth = np.asarray(Image.linear_gradient("L").resize((1024, 1024)).convert("RGB"))
    grain = np.random.default_rng(seed).normal(0, 6, smooth.shape)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


EIGHT = {"prompt": "a star", "width": 1024, "height": 1024, "num_images": 8, "seed": 1, "num_inference_steps": 1,
         "image_format": "png"}


@pytest.mark.parametrize("kind", ["photographs", "noise"])
def test_eight_large_pictures_fit_into_the_answer_of_run_as_jpeg(kind, drawn_at_once, monkeypatch):
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "https://api.runpod.example")
    photo = photo_like(1)
    with patch(f"{__name__}.Image.fromarray", return_value=photo) if kind == "photographs" else nullcontext():
        answer = handler({"id": "many", "input": EIGHT})
    assert len(answer["images"]) == 8 and len(json.dumps(answer)) <= INLINE_BYTES["/run"]
    assert answer["images"][0].startswith("data:image/jpeg") and "they are JPEG of quality" in answer["warnings"][-1]
    assert from_data_uri(answer["images"][7]).size == (1024, 1024)


def test_eight_large_pictures_stay_png_over_http(drawn_at_once):
    with patch(f"{__name__}.Image.fromarray", return_value=photo_like(1)):
        answer = handler({"id": "test-5b1e", "input": EIGHT})
    assert all(image.startswith("data:image/png") for image in answer["images"]) and len(answer["images"]) == 8
    assert len(json.dumps(answer)) > INLINE_BYTES["/run"] and "JPEG" not in str(answer["warnings"])
