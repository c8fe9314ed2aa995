"""Prompts that are longer than a text encoder reads: drawn in full or named in a warning, and never logged."""

import re

import numpy as np
import pytest
from handled import handled, pixels
from PIL import Image

from sdworker.core.families import FAMILIES
from sdworker.embedded.tiny_models import MINIATURES, miniature, with_refiner
from sdworker.serve.image_io import data_uri, from_data_uri

WORDS, UNWANTED = "zanzibar quagmire", "yellowknife voodoo"  # tokenizers keep their letters in this order
LONG, NEGATIVE = f"{WORDS} " * 40, f"{UNWANTED} " * 40
FIRST = ("FluxPipeline",)  # the others are slow tests


def logged(log: str) -> str:
    """A log in lower case without blanks and signs, as a tokenizer may have put them between letters."""
    return re.sub(r"[^a-z]", "", log.lower())


def drawn_long(pipeline: str, folder, **settings: str) -> tuple[dict, str]:
    """A long prompt and a long negative prompt, with two last words, and where the family has it, from a picture."""
    known = FAMILIES.get(pipeline)
    picture = {"image": data_uri(Image.new("RGB", (64, 64), "red")), "width": 64, "height": 64}
    job = {"prompt": LONG, "negative_prompt": NEGATIVE, "num_inference_steps": 2, "guidance_scale": 5.0}
    job |= picture if known and known.edits else {}
    jobs = {"one": job, "other": job | {"prompt": f"{LONG} star"},
            "unwanted": job | {"negative_prompt": f"{NEGATIVE} a"},
            "twice": job | {"prompt": [LONG, "a star"], "seed": 8}}
    if known and known.from_image:
        jobs |= {"picture": job | picture, "other picture": job | picture | {"prompt": f"{LONG} star"}}
    return handled(folder, jobs, **settings)


@pytest.mark.parametrize("pipeline", ["StableDiffusionXLPipeline", *(
    pytest.param(name, marks=[pytest.mark.slow] * (name not in FIRST))
    for name in MINIATURES if name != "LatentConsistencyModelPipeline")])
def test_long_prompts_are_read_or_named_and_never_logged(pipeline, tmp_path):
    folder = miniature(pipeline, tmp_path / "tiny") if pipeline in MINIATURES else "embedded"
    answers, log = drawn_long(pipeline, folder)
    assert not [word for word in [*WORDS.split(), *UNWANTED.split()] if word in logged(log)], log
    warnings = answers["one"]["warnings"]
    family = FAMILIES.get(pipeline)
    if family and family.chunks:
        assert warnings == []
        one, other, unwanted = (pixels(answers[name])[0] for name in ("one", "other", "unwanted"))
        assert (one != other).any() and (one != unwanted).any(), "the last words count"
        assert (pixels(answers["picture"])[0] != pixels(answers["other picture"])[0]).any()
    elif not (family and family.reads_pictures):
        left_out = [text for text in warnings if "and left out the last" in text]
        assert any(" of prompt, " in text for text in left_out)
        negative = not family or family.negative
        assert any(" of negative_prompt, " in text for text in left_out) == negative


@pytest.mark.slow
def test_a_short_prompt_beside_a_long_one_is_drawn_as_alone(tmp_path):
    folder = miniature("StableDiffusionPipeline", tmp_path / "tiny")
    answers, _ = handled(folder, {"both": {"prompt": ["a star", LONG], "seed": [7, 7]}, "alone": {"prompt": "a star"}})
    assert np.array_equal(pixels(answers["both"])[0], pixels(answers["alone"])[0])


@pytest.mark.slow
def test_a_refiner_reads_long_prompts_too(tmp_path):
    job = {"num_inference_steps": 10, "refiner_start": 0.8}
    answers, log = handled(with_refiner(tmp_path / "refined"), {
        "one": job | {"prompt": LONG}, "other": job | {"prompt": f"{LONG} star"}, "short": job})
    one, other, _ = (pixels(answers[name])[0] for name in ("one", "other", "short"))
    assert (one != other).any() and answers["one"]["warnings"] == answers["short"]["warnings"]
    assert "zanzibar" not in logged(log)


def test_clip_skip_reads_an_earlier_layer_and_is_written_into_the_file():
    job = {"num_inference_steps": 2, "metadata": True}
    picture = job | {"image": data_uri(Image.new("RGB", (64, 64), "red"))}
    answers, _ = handled("embedded", {
        "none": job | {"clip_skip": 0}, "one": job | {"clip_skip": 1}, "long": job | {"clip_skip": 1, "prompt": LONG},
        "last": job | {"prompt": LONG}, "picture": picture, "one picture": picture | {"clip_skip": 1},
        "plain": job, "all": job | {"clip_skip": 3}})
    drawn = {name: pixels(answer)[0] for name, answer in answers.items() if "images" in answer}
    assert np.array_equal(drawn["none"], drawn["plain"])
    for with_all, skipped in (("plain", "one"), ("last", "long"), ("picture", "one picture")):
        assert (drawn[with_all] != drawn[skipped]).any()
    written = {name: from_data_uri(answers[name]["images"][0]).text["parameters"] for name in ("plain", "one")}
    assert written["one"].endswith("Clip skip: 2") and "Clip skip" not in written["plain"], "as AUTOMATIC1111 counts"
    assert (answers["all"]["field"], answers["all"]["code"]) == ("clip_skip", "invalid_request")
