"""Each sampler on models whose own scheduler is anything that models have: it ends at the picture, or is refused."""

import inspect
import json
import shutil
from itertools import product
from pathlib import Path

import diffusers
import pytest
import torch
from handled import handled, pixels
from PIL import Image

from sdworker.core.model_info import EMBEDDED, Unsuited
from sdworker.core.schedulers import SAMPLERS, form_of, process_of, samplers_for, stand_in_for
from sdworker.engine.diffusers_pipeline import scheduler_for
from sdworker.serve.image_io import data_uri

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
V, SHIFTED, LEADING = {"prediction_type": "v_prediction"}, {"steps_offset": 1}, {"timestep_spacing": "leading"}
TRAILING, KARRAS = {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}
OLD = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True} | SHIFTED
SDE, ZERO_SNR = {"algorithm_type": "sde-dpmsolver++"}, {"rescale_betas_zero_snr": True} | TRAILING | V
OWN = {  # what models on the hub have as scheduler_config.json: diffusers' class without "Scheduler", and its settings
    "Stable Diffusion 1.5": ("PNDM", NOISE | OLD),
    "Stable Diffusion 2.1": ("DDIM", NOISE | OLD | V),
    "SDXL": ("EulerDiscrete", NOISE | OLD | LEADING | {"interpolation_type": "linear", "sample_max_value": 1.0}),
    "SDXL Turbo": ("EulerAncestralDiscrete", NOISE | OLD | TRAILING),
    "DEIS": ("DEISMultistep", NOISE | OLD | {"algorithm_type": "deis", "solver_type": "logrho", "solver_order": 2}),
    "DPM++": ("DPMSolverMultistep", NOISE | OLD | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
    "DPM++, order 3": ("DPMSolverMultistep", NOISE | {
        "solver_order": 3, "solver_type": "heun", "use_lu_lambdas": True, "euler_at_final": True}),
    "DPM": ("DPMSolverMultistep", NOISE | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "SDE, Karras": ("DPMSolverMultistep", NOISE | OLD | SDE | KARRAS | LEADING),
    "single step, order 3": ("DPMSolverSinglestep", NOISE | {"solver_order": 3, "lower_order_final": False}),
    "thresholding": ("DPMSolverMultistep", NOISE | {"thresholding": True, "lambda_min_clipped": -5.1}),
    "zero SNR": ("EulerDiscrete", NOISE | ZERO_SNR | SHIFTED),
    "zero SNR, DDIM": ("DDIM", NOISE | ZERO_SNR | {"clip_sample": False}),
    "Euler, Karras": ("EulerDiscrete", NOISE | KARRAS | LEADING | SHIFTED),
    "Euler, exponential": ("EulerDiscrete", NOISE | {"use_exponential_sigmas": True, "timestep_spacing": "linspace"}),
    "Euler, beta": ("EulerDiscrete", NOISE | {"use_beta_sigmas": True}),
    "LCM": ("LCM", NOISE | {"original_inference_steps": 50, "timestep_scaling": 10.0, "set_alpha_to_one": True}),
    "TCD": ("TCD", NOISE | OLD | {"original_inference_steps": 50}),
    "UniPC": ("UniPCMultistep", NOISE | OLD | {"solver_type": "bh2", "solver_order": 3}),
    "Heun": ("HeunDiscrete", NOISE | SHIFTED),
    "DPM2": ("KDPM2Discrete", NOISE | SHIFTED),
    "DPM2 ancestral": ("KDPM2AncestralDiscrete", NOISE | SHIFTED),
    "LMS": ("LMSDiscrete", NOISE | SHIFTED),
    "DPM++ SDE": ("DPMSolverSDE", NOISE | {"noise_sampler_seed": None}),
    "clipping": ("DDIM", NOISE | {"clip_sample": True}),
    "DDPM": ("DDPM", NOISE | {"variance_type": "fixed_small", "clip_sample": True}),
    "sample": ("DDIM", NOISE | OLD | {"prediction_type": "sample"}),
    "EDM, DPM++": ("EDMDPMSolverMultistep", {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 0.5, "rho": 7.0}),
    "EDM, Euler": ("EDMEuler", V | {"sigma_max": 120.0, "sigma_data": 1.0, "sigma_schedule": "exponential"}),
    "continuous": ("EulerDiscrete", NOISE | V | KARRAS | LEADING | SHIFTED | {
        "timestep_type": "continuous", "sigma_max": 700.0, "sigma_min": 0.002}),
    "flow matching": ("FlowMatchEulerDiscrete", {"num_train_timesteps": 1000, "shift": 3.0}),
    "flow matching, UniPC": ("UniPCMultistep", NOISE | {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers, thousands of them
PICTURE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).tanh()  # within what clipping keeps


def config_of(own: str) -> dict:
    name, config = OWN[own]
    return config | {"_class_name": f"{name}Scheduler"}


def loaded(own: str):
    """The model's own scheduler, or what is loaded in its place."""
    config = config_of(own)
    stand_in = stand_in_for(config)
    class_name, config = form_of(stand_in, config) if stand_in else (config["_class_name"], config)
    return getattr(diffusers, class_name).from_config(config)


def perfect_denoiser(own: str, noises: list):
    """A denoiser that was trained, by the model's noise process, on one picture; lists the noise in its inputs."""
    config, process = config_of(own), process_of(config_of(own))
    kind, data = config.get("prediction_type", "epsilon"), config.get("sigma_data", 0.5)
    betas = {name: value for name, value in config.items() if name in (*NOISE, "rescale_betas_zero_snr")}
    alphas = diffusers.EulerDiscreteScheduler.from_config(betas).alphas_cumprod.double()
    logs = ((1 - alphas) / alphas).log() / 2  # of the noise levels

    def level(t):
        if process == "flow":
            return t / 1000
        if process in ("edm", "continuous"):
            return (4 * t).exp()
        below = t.floor().long().clamp(0, len(logs) - 2)
        return logs[below].lerp(logs[below + 1], t - below).exp()

    def predict(x, t):
        sigma = level(torch.as_tensor(t).double())
        if process == "flow":
            noises.append((x - (1 - sigma) * PICTURE) / sigma)
            return noises[-1] - PICTURE
        norm = (sigma**2 + (data**2 if process == "edm" else 1)).sqrt()
        noises.append((x * norm - PICTURE) / sigma)
        if process == "edm":
            out = sigma * data / norm * (1 if kind == "epsilon" else -1)
            return (PICTURE - (data / norm) ** 2 * x * norm) / out
        return {"epsilon": noises[-1], "v_prediction": (noises[-1] - sigma * PICTURE) / norm, "sample": PICTURE}[kind]

    return predict


def drawn(scheduler, denoiser, steps: int):
    """Latents after a pipeline's loop."""
    random = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    x = torch.randn(PICTURE.shape, generator=random) * scheduler.init_noise_sigma
    extra = {"generator": random} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(scheduler.scale_model_input(x, t), t).float(), t, x, **extra).prev_sample
    return x


def check(own: str, counts) -> None:
    """Each sampler gives the denoiser the noise that it was trained with, and ends at the picture, or is refused."""
    scheduler, fitting = loaded(own), samplers_for(config_of(own))
    for sampler in {*SAMPLERS} - {*fitting}:
        with pytest.raises(Unsuited, match=f"scheduler is {sampler}, .* name one of {', '.join(fitting)}, or leave"):
            scheduler_for(scheduler, sampler)
    for sampler, steps in product(["", *fitting], counts):
        latents = drawn(scheduler_for(scheduler, sampler), perfect_denoiser(own, noises := []), steps)
        assert latents.isfinite().all(), (sampler, steps)
        error, amounts = (latents - PICTURE).abs().mean(), torch.stack(noises).std((1, 2, 3, 4))
        # with fewer steps and leading spacing the first timestep is far below the noise that it begins with
        assert steps < 4 or error < 0.1, (sampler, steps, error)
        assert steps < 4 or ((amounts > 0.6) & (amounts < 1.6)).all(), (sampler, steps, amounts)


@pytest.mark.slow
@pytest.mark.parametrize("own", OWN)
def test_every_sampler_ends_at_the_picture(own):
    check(own, range(1, 8))


@pytest.mark.parametrize("own", ["SDXL", "DEIS", "SDE, Karras", "zero SNR", "LMS", "EDM, DPM++", "flow matching"])
def test_samplers_end_at_the_picture(own):
    check(own, [4])


def with_scheduler(own: str, folder: Path) -> Path:
    """A copy of the embedded model with another scheduler of its own."""
    shutil.copytree(EMBEDDED, folder)
    index, config = folder / "model_index.json", config_of(own)
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", config["_class_name"]))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("own", [
    "LMS", "EDM, DPM++", *(pytest.param(own, marks=pytest.mark.slow) for own in ("DEIS", "flow matching"))])
def test_jobs_for_a_model_with_an_unusual_scheduler(own, tmp_path):
    few, image = {"num_inference_steps": 3}, data_uri(Image.new("RGB", (64, 64), "red"))
    jobs = {"plain": few, "euler": few | {"scheduler": "euler"}, "image": few | {"image": image},
            "heun": {"scheduler": "heun"}}
    answers, _ = handled(with_scheduler(own, tmp_path / "model"), jobs)
    for name in ("plain", "euler", "image"):
        assert pixels(answers[name])[0].shape == (64, 64, 3), name
    stands_in = [name for name in jobs if "stands in for it" in " ".join(answers[name].get("warnings", []))]
    assert stands_in == (["plain", "image"] if own in ("LMS", "flow matching") else [])
    refused = "no other but euler, dpmpp_2m" in answers["heun"].get("error", "")
    assert refused == (own in ("EDM, DPM++", "flow matching")), answers["heun"]
