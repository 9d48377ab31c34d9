"""Samples in plain PyTorch: DDIM by hand, without diffusers' pipelines or schedulers.

python example.py --num-images 16 --out images.png
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import save_image

HERE = Path(__file__).resolve().parent


def load_experts() -> Any:
    """Load the experts by the code beside them."""
    spec = importlib.util.spec_from_file_location("experts", HERE / "experts" / "experts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Experts.from_pretrained(HERE / "experts")


@torch.inference_mode()
def main() -> None:
    """Sample images with DDIM, eta 0 (arXiv:2010.02502, equation 12)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("images.png"))
    flags = parser.parse_args()

    experts = load_experts()
    index = json.loads((HERE / "model_index.json").read_text())
    scheduler = json.loads((HERE / "scheduler" / "scheduler_config.json").read_text())
    if "trained_betas" not in scheduler or scheduler.get("use_flow_sigmas", False):
        parser.error("this is DDIM, which needs betas: rectified flow is sampled by pipeline.py")
    betas = torch.tensor(scheduler["trained_betas"], dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    if scheduler.get("rescale_betas_zero_snr", False):  # arXiv:2305.08891, algorithm 1
        roots = alpha_bar.sqrt()
        alpha_bar = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    num_timesteps, steps = len(betas), flags.steps or index["num_inference_steps"]
    stride, offset = num_timesteps // steps, scheduler.get("steps_offset", 0)
    times = [step * stride + offset for step in range(steps)]
    if scheduler.get("timestep_spacing") == "trailing" or num_timesteps % steps:
        times = [round((step + 1) * num_timesteps / steps) - 1 for step in range(steps)]
    last = 1.0 if scheduler.get("set_alpha_to_one", True) else float(alpha_bar[0])

    shape = (flags.num_images, index["channels"], index["height"], index["width"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(flags.seed))
    labels = None
    if index["num_classes"] is not None:
        labels = torch.arange(flags.num_images) % index["num_classes"]
    for t in reversed(times):
        now = float(alpha_bar[t])
        before = float(alpha_bar[t - stride]) if t >= stride else last
        seen = torch.full((len(x),), t * index["timestep_scale"])
        output = experts.for_timestep(t)(x, seen, class_labels=labels).sample[:, : shape[1]]
        if scheduler["prediction_type"] == "epsilon":
            x_0 = (x - (1 - now) ** 0.5 * output) / now**0.5
        elif scheduler["prediction_type"] == "sample":
            x_0 = output
        else:  # v_prediction
            x_0 = now**0.5 * x - (1 - now) ** 0.5 * output
        clipped = x_0.clamp(-1, 1) if scheduler.get("clip_sample", False) else x_0
        known = clipped if index["use_clipped_model_output"] else x_0
        epsilon = (x - now**0.5 * known) / (1 - now) ** 0.5
        x = before**0.5 * clipped + (1 - before) ** 0.5 * epsilon
    if index["first_stage"][0] is not None:
        import diffusers

        kind = getattr(diffusers, index["first_stage"][1])
        decoder = kind.from_pretrained(
            HERE / "first_stage", use_safetensors=True, low_cpu_mem_usage=False
        )
        shift = decoder.config.get("shift_factor") or 0.0
        x = decoder.decode(x / decoder.config["scaling_factor"] + shift).sample
    save_image(x.clamp(-1, 1) / 2 + 0.5, flags.out, nrow=round(flags.num_images**0.5))


if __name__ == "__main__":
    main()
