"""What the memory planner computes without numbers, against the same components at work in their pipelines."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdworker.core.families import FAMILIES
from sdworker.core.model_info import EMBEDDED, ModelInfo, read_model_info
from sdworker.embedded.tiny_models import MINIATURES, miniature
from sdworker.engine.diffusers_pipeline import load_pipeline
from sdworker.engine.generate import generate
from sdworker.engine.memory_planner import (
    SOURCE_TOKENS,
    CallShape,
    Way,
    activations,
    bytes_of,
    denoiser_call,
    meta_components,
    peak_bytes,
)
from sdworker.engine.pipeline import FamilyEngine
from sdworker.lab.bench import gpu_suite

READER = "processor/preprocessor_config.json"
LONG = {  # by pipeline and file: configurations for prompts and pictures as long as the real models read
    "ZImagePipeline": {"transformer/config.json": {"axes_lens": [1024, 32, 32]}},
    "QwenImageEditPipeline": {READER: {"max_pixels": SOURCE_TOKENS * 28**2}},
    "QwenImageEditPlusPipeline": {READER: {"max_pixels": SOURCE_TOKENS * 28**2}}}
PLUS = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"


def model_of(pipeline: str, folder: Path, changed: dict[str, dict]) -> ModelInfo:
    """A small model of a pipeline class, with changes in its configuration files."""
    miniature(pipeline, folder) if pipeline in MINIATURES else shutil.copytree(EMBEDDED, folder)
    for name, values in changed.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))
    return read_model_info(folder)


def watched(engine: FamilyEngine) -> dict[str, int]:
    """Bytes of the largest moment of each component's calls, by component, filled while the engine draws."""
    moments: dict[str, int] = {}

    def watch(name: str, call, *args, **named):
        made = []
        moments[name] = max(moments.get(name, 0), peak_bytes(lambda: made.append(call(*args, **named))))
        return made[0]
    for name, part in engine.pipe.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            part.forward = partial(watch, name, part.forward)
    vae = engine.pipe.vae
    vae.decode, vae.encode = partial(watch, "vae", vae.decode), partial(watch, "vae", vae.encode)
    return moments


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_the_largest_moment_is_the_one_at_work(pipeline, tmp_path):
    model = model_of(pipeline, tmp_path / "tiny", LONG.get(pipeline, {}))
    edits, dtype = model.family.edits, model.family.gpu_dtype
    batch, engine = 1 if edits else 2, FamilyEngine(model, dtype=dtype)
    moments, words, picture = watched(engine), "a" * 2000, None
    if edits:  # its text encoder reads all of a prompt: 64 tokens of the template, 512 others, and the picture's
        plus = "Plus" in pipeline  # which makes less of a picture, and writes more around it
        template = engine.pipe.prompt_template_encode.format(PLUS if plus else "")
        template_tokens = len(engine.pipe.tokenizer(template).input_ids) - 1 + (14 * 14 if plus else SOURCE_TOKENS)
        words, picture = "a" * (64 + 512 + SOURCE_TOKENS - template_tokens), Image.new("RGB", (1024, 1024))
    generate(engine, words, negative_prompt=words, width=64, height=64, steps=1, guidance=3.0, seed=1, n=batch,
             image=picture)
    parts = meta_components(model, dtype)
    computed = activations(parts, Way(batch), 64, 64, edits=edits)
    if model.family.chunks:  # 2,000 tokens, 75 in a chunk
        side = 64 // engine.pipe.vae_scale_factor
        computed["unet"] = peak_bytes(denoiser_call(parts["unet"], CallShape(side, side, batch, chunks=27)))
    assert computed.keys() == moments.keys()
    for name, at_work in moments.items():
        if not (edits and name == "text_encoder"):  # what sees the picture is not computed, and here the larger part
            assert abs(computed[name] / at_work - 1) < 0.02, (name, computed[name], at_work)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("pipeline", ["StableDiffusionXLPipeline", *MINIATURES])
def test_number_formats_are_those_of_a_load(pipeline, dtype, tmp_path):
    model = model_of(pipeline, tmp_path / "tiny", {"vae/config.json": {"force_upcast": True}})
    loaded, computed = load_pipeline(model, dtype=dtype), meta_components(model, dtype)
    for name, part in computed.items():
        at_work = {key: weight.dtype for key, weight in getattr(loaded, name).named_parameters()}
        assert {key: weight.dtype for key, weight in part.named_parameters()} == at_work, name
        weights = sum(weight.nbytes for weight in getattr(loaded, name).parameters())
        buffers = sum(buffer.nbytes for buffer in getattr(loaded, name).buffers())
        assert abs(bytes_of(part) - weights - buffers) <= buffers, name
    vae = next(computed["vae"].parameters()).dtype
    assert (vae == torch.float32) == (dtype == "float32" or (dtype == "float16" and "XL" in pipeline))


@pytest.mark.parametrize("pipeline", ["FluxPipeline", "ZImagePipeline", "QwenImagePipeline"])
def test_the_benchmark_counts_transformers(pipeline, tmp_path):
    suite = gpu_suite(model_of(pipeline, tmp_path / "tiny", {}).folder, "cpu", tiny=True)
    assert suite["roofline"]()["operations"] > 1e6
    assert all(row["computed"] > 1e5 for row in suite["memory"]().values())
