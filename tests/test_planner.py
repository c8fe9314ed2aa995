"""What the memory planner computes without numbers, against the same components at work in their pipelines."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdworker.card import EMBEDDED, ModelCard, read_card
from sdworker.engine import denoiser_of, generate, load_pipeline
from sdworker.families import FAMILIES
from sdworker.memory import PICTURE_TOKENS, Way, activations, bytes_of, meta_components, peak_bytes
from sdworker.miniatures import MINIATURES, miniature
from sdworker.whole import FamilyEngine


READER = "processor/preprocessor_config.json"
LONG = {  # by pipeline and file: configurations for prompts and pictures as long as the real models read
    "ZImagePipeline": {"transformer/config.json": {"axes_lens": [1024, 32, 32]}},
    "QwenImageEditPipeline": {READER: {"max_pixels": PICTURE_TOKENS * 28**2}},
    "QwenImageEditPlusPipeline": {READER: {"max_pixels": PICTURE_TOKENS * 28**2}}}


def model_of(pipeline: str, folder: Path, changed: dict[str, dict]) -> ModelCard:
    """A small model of a pipeline class, with changes in its configuration files."""
    miniature(pipeline, folder) if pipeline in MINIATURES else shutil.copytree(EMBEDDED, folder)
    for name, values in changed.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))
    return read_card(folder)


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
    card = model_of(pipeline, tmp_path / "tiny", LONG.get(pipeline, {}))
    edits, dtype = card.family.edits, card.family.half
    batch, engine = 1 if edits else 2, FamilyEngine(card, dtype=dtype)
    moments = watched(engine)
    picture = Image.new("RGB", (1024, 1024)) if edits else None
    words = "a" * (512 if edits else 2000)  # more than any family reads, but for those that read all of it
    generate(engine, words, words, 64, 64, 1, 3.0, seed=1, n=batch, image=picture)
    computed = activations(meta_components(card, dtype), Way(batch), 64, 64, edits=edits)
    assert computed.keys() == moments.keys()
    for name, at_work in moments.items():
        exact = name == "vae" or name == card.denoiser
        print("XX", pipeline, name, computed[name], at_work, computed[name] / at_work)
