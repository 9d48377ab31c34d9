"""Imports of networks of openai/guided-diffusion (ADM), held against the original code.

    git clone https://github.com/openai/guided-diffusion DIR
    python -m tests.models.checkpoints.guided_diffusion DIR experiments/results/adm_import.json

The original builds the networks of its README's diffusion models, narrower and with random weights
(none stays at its initial 0), and what ``tdc-ray import openai:FILE`` makes of their files is held
against them in float32. At their full width, without weights, parameters and macs are counted: the
original's, and those of a network of the config that its shapes tell.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tdc_ray.cli.parse import parse
from tdc_ray.models.checkpoints.openai import config_from_state_dict
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.unet import load_unet
from tdc_ray.storage.files import write_json
from tdc_ray.storage.provenance import commit, machine
from tests.models.counting import COUNTED

SHARED = {"attention_resolutions": "32,16,8", "learn_sigma": True}
SHARED |= {"resblock_updown": True, "use_scale_shift_norm": True}
RELEASED: Mapping[str, dict[str, Any]] = {
    "64x64": {
        "image_size": 64,
        "class_cond": True,
        "num_channels": 192,
        "num_head_channels": 64,
        "num_res_blocks": 3,
        "use_new_attention_order": True,
    },
    "128x128": {"image_size": 128, "class_cond": True, "num_channels": 256, "num_heads": 4},
    "256x256": {
        "image_size": 256,
        "class_cond": True,
        "num_channels": 256,
        "num_head_channels": 64,
    },
    "256x256 (not class conditional, LSUN)": {
        "image_size": 256,
        "num_channels": 256,
        "num_head_channels": 64,
    },
    "512x512": {
        "image_size": 512,
        "class_cond": True,
        "num_channels": 256,
        "num_head_channels": 64,
    },
}
"""Flags of the README's diffusion models, beside :data:`SHARED`."""

NOISE = (
    "--diffusion.num-train-timesteps 1000 --diffusion.beta-schedule linear "
    "--diffusion.beta-start 0.0001 --diffusion.beta-end 0.02 "
    "--diffusion.no-rescale-timesteps"
)
"""The noise process, which no file says; outputs do not depend on it."""

NARROW = {"num_channels": 32, "num_head_channels": 32}
"""Of the narrow ones; the 128x128 one has 4 heads, however wide."""

OTHERS: Mapping[str, dict[str, Any]] = {
    "64x64, not class conditional": {"class_cond": False},
    "64x64, heads before q, k and v": {"use_new_attention_order": False},
    "64x64, convolutions between levels": {"resblock_updown": False},
    "64x64, no scale_shift, no variance": {"use_scale_shift_norm": False, "learn_sigma": False},
    "64x64, other heads on the way up": {
        "num_head_channels": -1,
        "num_heads": 2,
        "num_heads_upsample": 4,
    },
}
"""Changes of the narrow 64x64 one."""


def create(original: Any, flags: Mapping[str, Any]) -> nn.Module:
    """Build a network by the original's own defaults and flags."""
    network, _ = original.create_model_and_diffusion(
        **{**original.model_and_diffusion_defaults(), **SHARED, **flags}
    )
    return network.eval()


def fill(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights anew, for outputs about as large as noise; no layer is left at 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            is_scale = name.endswith("weight")  # of a norm
            parameter.data = is_scale + 0.1 * drawn
        else:
            parameter.data = drawn / parameter[0].numel() ** 0.5
    return network


def flags_of(flags: Mapping[str, Any]) -> list[str]:
    """Return what an import has to be told."""
    size = str(flags["image_size"])
    told = ["--data.image-size", size, *NOISE.split()]
    if flags.get("num_head_channels", -1) > 0:
        told += ["--model.num-head-channels", str(flags["num_head_channels"])]
    else:
        told += ["--model.num-heads", str(flags["num_heads"])]
    if flags.get("num_heads_upsample", -1) > 0:
        told += ["--model.num-heads-upsample", str(flags["num_heads_upsample"])]
    if flags.get("use_new_attention_order"):
        told += ["--model.use-new-attention-order"]
    return told


@torch.inference_mode()
def compared(original: Any, flags: Mapping[str, Any]) -> dict[str, float]:
    """Import a network, and compare its outputs with the original's."""
    network = fill(create(original, flags))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save(network.state_dict(), file)
        arguments = ["import", f"openai:{file}", f"{folder}/base", *flags_of(flags)]
        parse(arguments).execute(Console(quiet=True))
        imported = load_unet(Path(folder) / "base/unet")
    timesteps = torch.tensor([3.0, 980.0])
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))  # a part of larger
    labels = torch.tensor([7, 993]) if flags.get("class_cond") else None
    expected: Tensor = network(x, timesteps, labels)
    found: Tensor = imported(x, timesteps, class_labels=labels).sample
    return {
        "num_params": count_params(network),
        "std": expected.std().item(),
        "max_difference": (found - expected).abs().max().item(),
    }


def told(original: Any, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Derive a wide network's config from its shapes, and count its parameters and macs."""
    size, labels = flags["image_size"], None
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = create(original, flags)
        if flags.get("class_cond"):
            labels = torch.zeros(1, dtype=torch.long)
        network(torch.zeros(1, 3, size, size), torch.zeros(1), labels)
    flops = counter.get_flop_counts()["Global"]
    config = config_from_state_dict(network.state_dict())
    config["sample_size"] = size
    structure = network_structure(config)
    return {
        "num_params": count_params(network),
        "num_params_told": structure.num_params,
        "macs": sum(flops.get(operation, 0) for operation in COUNTED) // 2,
        "macs_told": structure.macs,
    }


def main() -> None:
    """Compare all, and write the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", type=Path, help="a checkout of openai/guided-diffusion")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.original))
    original = importlib.import_module("guided_diffusion.script_util")
    names = ("64x64", "128x128", "256x256", "512x512")
    cases = {name: {**RELEASED[name], **NARROW} for name in names}
    cases["128x128"]["num_head_channels"] = -1
    cases["512x512"]["num_channels"] = 64  # half of which are the first level's: groups are 32
    cases |= {name: {**cases["64x64"], **changes} for name, changes in OTHERS.items()}
    record: dict[str, Any] = {
        "command": f"python -m tests.models.checkpoints.guided_diffusion DIR {arguments.out}",
        "original": "openai/guided-diffusion 22e0df8183507e13a7813f8d38d51b072ca1e67c",
        "commit": commit(),
        "machine": machine(),
        "torch": torch.__version__,
        "imports": {},
        "released": {name: told(original, flags) for name, flags in RELEASED.items()},
    }
    for name, flags in cases.items():
        record["imports"][name] = compared(original, {**SHARED, **flags})
        Console().print(name, record["imports"][name])
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
