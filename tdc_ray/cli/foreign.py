"""Names that other tools have for settings."""

from difflib import get_close_matches

FOREIGN = {
    "lr": ("--base.learning-rate", "--finetune.learning-rate"),
    "steps": ("--base.num-steps", "--finetune.num-steps", "--sampler.num-inference-steps"),
    "max-train-steps": ("--base.num-steps", "--finetune.num-steps"),
    "train-batch-size": ("--base.batch-size", "--finetune.batch-size"),
    "train-data-dir": ("--data",),
    "resolution": ("--data.image-size",),
    "output-dir": ("--run-dir", "--storage", "--out-dir", "--out"),
    "random-flip": ("--data.horizontal-flip",),
    "scheduler": ("--sampler.scheduler",),
    "gpus": ("--compute.gpus-per-base-worker", "--compute.gpus-per-actor"),
}
"""What other tools call a flag, that tyro does not find by its letters."""


def nearest(stage: str, name: str, known: list[str]) -> str | None:
    """Return the setting of a stage that a name is meant for. None means that there is none."""
    flags = FOREIGN.get(name.replace("_", "-"), ())
    named = [flag for flag in flags if flag.startswith(f"--{stage}.")]
    if named:
        return named[0].rpartition(".")[2].replace("-", "_")
    return next(iter(get_close_matches(name, known, n=1)), None)
