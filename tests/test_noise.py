"""The same seed gives the same picture in every number format, whatever torch's noise in half precision is."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from sdworker.aot.sampler_tables import TABLED, make_table, run_table, seeded
from sdworker.core.families import FAMILIES
from sdworker.core.model_info import EMBEDDED, read_model_info
from sdworker.embedded.tiny_models import MINIATURES, miniature, with_refiner
from sdworker.engine.diffusers_pipeline import scheduler_for
from sdworker.engine.generate import generate
from sdworker.engine.lora_refiner import use_addons
from sdworker.engine.pipeline import FamilyEngine

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
START, MASK = Image.new("RGB", (64, 64), "blue"), Image.new("L", (64, 64))
START.paste("red", (8, 8, 40, 48))
MASK.paste(255, (16, 0, 64, 64))
BEGINNINGS = {"noise": {}, "image": {"image": START}, "mask": {"image": START, "mask_image": MASK}}


class OtherNoise(TorchDispatchMode):
    """Noise drawn in half precision is other noise than float32's, as in torch 2.10 and 2.11."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        random = any(word in func._schema.name for word in ("rand", "normal", "uniform"))
        return result.flip(-1) if random and result.dtype in HALF.values() else result


def psnr(picture, reference, span: float = 255) -> float:
    """How near a picture is, in dB."""
    error = np.square(np.asarray(picture, float) - np.asarray(reference, float)).mean()
    return 10 * np.log10(span**2 / max(error, 1e-12))


def agree(folder, *formats: str, prepare=lambda engine: None, **options) -> None:
    """Whether pictures in these formats are float32's, up to rounding; other noise gives 12 to 32 dB."""
    pictures = {}
    for dtype in ("float32", *formats):
        engine = FamilyEngine(read_model_info(folder), dtype=dtype)
        prepare(engine)
        with OtherNoise():
            pictures[dtype] = generate(engine, "a red star", seed=7, width=64, height=64, **options).pictures[0].image
    for dtype in formats:
        assert psnr(pictures[dtype], pictures["float32"]) > 44, dtype


def test_noise_in_half_precision_is_other_noise_here():
    with OtherNoise():
        single, half = (torch.randn(1000, generator=seeded(7), dtype=dtype).float()
                        for dtype in (torch.float32, torch.float16))
    assert torch.corrcoef(torch.stack([single, half]))[0, 1].abs() < 0.2


@pytest.mark.parametrize("pipeline", ["StableDiffusionXLPipeline", *MINIATURES])
def test_a_family_draws_the_same_in_every_format(pipeline, tmp_path):
    folder, family = EMBEDDED, FAMILIES.get(pipeline)
    if pipeline in MINIATURES:
        folder = miniature(pipeline, tmp_path / "tiny")
    if family and family.edits:  # at a megapixel, so once
        return agree(folder, family.gpu_dtype, steps=1, guidance=1.0, image=START)
    for begins, options in BEGINNINGS.items():  # of 3 steps or fewer a single one is left, of hardly any noise
        if begins == "noise" or family:
            agree(folder, *HALF, steps=4, **options)


@pytest.mark.parametrize("sampler", ["euler_a", "ddpm", "lcm"])
def test_a_sampler_adds_the_same_noise_in_every_format(sampler):
    agree(EMBEDDED, *HALF, sampler=sampler, steps=3)


def test_a_refiner_draws_the_same_in_every_format(tmp_path):
    folder = with_refiner(tmp_path / "model")
    agree(folder, *HALF, prepare=use_addons, sampler="euler_a", steps=4, refiner_start=0.5)


@pytest.mark.parametrize("sampler", TABLED)
def test_a_table_draws_the_same_in_every_format(sampler):
    scheduler = scheduler_for(FamilyEngine(read_model_info(EMBEDDED)).pipe.scheduler, sampler)
    table, latents = make_table(scheduler, 8), {}
    for dtype in (torch.float32, *HALF.values()):
        with OtherNoise():
            latents[dtype] = run_table(table, lambda x, t: torch.tanh(x), (2, 4, 8, 8), [seeded(7), seeded(8)], dtype)
    single = latents.pop(torch.float32)
    for dtype, half in latents.items():
        assert psnr(half.float(), single, single.abs().max().item()) > 40, dtype
