"""The paper's own numbers (arXiv:2312.13307), always shown as the paper's."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A row of Table I."""

    macs: float
    """The paper's mean "FLOPs" over the sampling steps, in macs."""

    fid: float
    num_params: float
    train_steps: float


NO_PRUNING = "TDC, no pruning"

DATASETS = {"cifar10": "CIFAR-10", "imagenet64": "ImageNet-64", "ffhq256-ldm": "FFHQ-256, LDM"}
"""The datasets of Table I with the names that it gives them."""

_SAME = {
    "cifar10-cosine": "cifar10",
    "ddpm-cifar10": "cifar10",
    "imagenet64-cosine": "imagenet64",
    "ddpm-ffhq256": "ffhq256-ldm",
}

TABLE_1: Mapping[str, Mapping[str, PaperRow]] = {
    "cifar10": {
        "base": PaperRow(8.14e9, 4.08, 52.5e6, 500e3),
        NO_PRUNING: PaperRow(8.14e9, 3.52, 52.5e6, 280e3),
        "TDC": PaperRow(6.56e9, 3.76, 48.7e6, 450e3),
    },
    "imagenet64": {
        "base": PaperRow(39.3e9, 20.7, 121e6, 1.5e6),
        NO_PRUNING: PaperRow(39.3e9, 17.6, 121e6, 1.1e6),
        "TDC": PaperRow(32.7e9, 19.2, 103e6, 1.3e6),
    },
    "ffhq256-ldm": {
        "base": PaperRow(96.1e9, 5.0, 274.1e6, 635e3),
        NO_PRUNING: PaperRow(96.1e9, 4.27, 274.1e6, 350e3),
        "TDC": PaperRow(77.2e9, 4.73, 231.0e6, 550e3),
    },
}
"""Table I: the original IDDPM or LDM, TDC without pruning, TDC with k = 0.5 and N = 10."""

PAPER = {dataset: rows["TDC"] for dataset, rows in TABLE_1.items()}
"""TDC with pruning, k = 0.5 and N = 10, by the preset of its setting."""

TABLE_4 = {"prune": 78.0, "finetune": 190e3, "all": 342e3}
"""Table IV in seconds: GPT-4's answers, fine-tuning, all of it (CIFAR-10)."""

SWEPT: Mapping[str, Mapping[object, float]] = {
    "plan.schedule": {
        "snr": 3.76,
        "constant": 3.91,
        "uni-increasing": 3.88,
        "uni-decreasing": 4.11,
    },
    "plan.num_groups": {4: 3.62, 8: 3.56, 10: 3.52, 15: 3.56, 20: 3.60},
    "prune.method": {
        "random": 3.95,
        "magnitude": 3.88,
        "lamp": 3.88,
        "taylor": 3.90,
        "diff-pruning": 3.85,
        "offline": 3.76,
        "llm": 3.76,
    },
}
"""FID on CIFAR-10 by a setting that varies: Tables II, III (without pruning) and VI."""


def paper_dataset(preset: str) -> str:
    """Return a preset's dataset in Table I; CIFAR-10 for others."""
    name = _SAME.get(preset, preset)
    return name if name in DATASETS else "cifar10"


def is_of_the_paper(preset: str) -> bool:
    """Whether the paper has the preset's dataset."""
    return _SAME.get(preset, preset) in DATASETS
