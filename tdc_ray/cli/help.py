"""The short help of commands that have every setting of a run as a flag: those that people use.

Choices and defaults are read from the settings; ``--help-all`` is tyro's own help, of all flags.
"""

from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from tdc_ray.cli.flags import owner, taken_by
from tdc_ray.config.image_size import size_text
from tdc_ray.config.run import RunConfig

WIDTH = 100
"""Most columns of a line."""

COLUMN = 36
"""Column in which texts begin."""

IMAGES = {
    "--data PATH": "your images: folder, file or hub name; base: drawn from --base",
    "--preset NAME": "settings to start from; tdc-ray --help lists them",
    "--data.image-size PIXELS": "what images are brought to, such as 64, or 48x64",
    "--data.num-channels N": "grey or colour",
}
MODEL = {
    "--base BASE": "start from a released or saved base, in place of training one",
    "--model.architecture NAME": "network to train where no --base is given",
}
PLAN = {
    "--plan.num-groups N": "groups of timesteps, an expert for each",
    "--plan.min-macs-share SHARE": "of the base's macs for the easiest timestep",
}
STEPS = {
    "--base.num-steps N": "optimizer steps of the base",
    "--finetune.num-steps N": "optimizer steps of each expert; 0: training-free",
    "--base.batch-size N": "images per step of the base",
    "--base.learning-rate RATE": "AdamW's learning rate after the warm-up",
}
METHOD = {"--prune.method NAME": "who proposes what is pruned"}
ROUNDS = {"--prune.num-rounds N": "rounds of proposing and measuring, for each group"}
SAMPLING = {
    "--sampler.scheduler NAME": "any scheduler of diffusers; base: the base's own",
    "--sampler.num-inference-steps N": "denoising steps",
    "--compare KIND": "equal-macs also trains the base longer",
}
ACTORS = {"--compute.num-actors N": "most workers side by side; default: as many as fit"}
SEED = {"--seed N": "seed of everything random"}
LOGGING = {"--log-to NAME ...": "trackers beside TensorBoard"}
RUN = {
    "--run-dir DIR": "folder or URI of all results; default: named after the settings",
    **LOGGING,
    "--dry-run": "show settings and plan, check the data, and stop",
}
LENGTH = {
    "--hours H": "time that the run may take, which sets the steps",
    "--epochs N": "how often the base sees every image, which sets the steps",
}
BUDGET = "Compute budget and steps"
SETTINGS = {
    "Images": IMAGES,
    "Model": MODEL,
    BUDGET: PLAN | STEPS,
    "Pruning": METHOD,
    "Sampling and scores": SAMPLING,
}

SHORT: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "run": SETTINGS | {BUDGET: LENGTH | PLAN | STEPS, "Where it runs": RUN | ACTORS | SEED},
    "sweep": {
        "Search": {
            "--vary FIELD=A,B ...": "what is varied: values, or FIELD=LOW..HIGH (required)",
            "--search NAME": "how settings are searched",
            "--num-trials N": "settings that random and tpe try",
            "--objectives NAME ...": "what is minimised",
            "--seeds N ...": "training seeds of each setting",
        },
        **SETTINGS,
        "Where it runs": {
            "--name NAME": "name of the sweep's folder",
            "--storage DIR": "folder or URI that it lies in",
            **LOGGING,
            "--max-concurrent N": "trials at once",
            **ACTORS,
        },
    },
    "plan": {
        "Model": {"--preset NAME": IMAGES["--preset NAME"], **MODEL},
        "Groups and limits": PLAN
        | {
            "--plan.schedule NAME": "how the limits move with the timestep",
            "--diffusion.beta-schedule NAME": "the noise schedule",
            "--diffusion.num-train-timesteps N": "timesteps",
            "--sampler.num-inference-steps N": SAMPLING["--sampler.num-inference-steps N"],
        },
        "Output": {"--out-dir DIR": "where plan.json and plan.png go"},
    },
    "prune": {
        "Model and images": {
            "MODEL-DIR": "folder of a UNet or DiT or a pipeline, or a run directory (required)",
            "--data DATA": "digits, photos, an npz file, a folder, or base; default: the run's",
            "--preset NAME": "settings to start from, where the model has no run",
        },
        "Limit": {
            "--macs SHARE": "of the model's macs that are left, in (0, 1]; default: 0.7",
            "--milliseconds MS": "most time of a forward pass, in place of macs",
            "--timesteps FIRST LAST": "timesteps to prune for; default: all",
            "--group N": "a group of the plan to prune for, in place of timesteps",
        },
        "Pruning": {
            "--method NAME": "who proposes what is pruned",
            "--prune.num-rounds N": "rounds of proposing and measuring",
            "--prune.space NAME": "what can be pruned",
            "--prune.num-refit-images N": "noised images of the refit",
        },
        "Output": {"--out DIR": "where the pruned model and report.json go (required)", **SEED},
    },
    "simulate": {
        "Cluster": {
            "--workers N ...": "numbers of workers to try",
            "--costs RUN": "a run whose measured times are used",
            "--macs-per-second N": "speed of a worker, where nothing was measured",
            "--failures-per-hour N": "how often each worker dies",
            "--joins-per-hour N": "how often one joins while some are missing",
            "--trials N": "runs that share the workers",
        },
        "Model": {"--preset NAME": IMAGES["--preset NAME"], **MODEL},
        BUDGET: PLAN | {"--finetune.num-steps N": STEPS["--finetune.num-steps N"]},
        "Pruning": METHOD | ROUNDS,
        "Output": {"--json FILE": "where the table goes as JSON"},
    },
    "train-autoencoder": {
        "Images": {
            "--data DATA": "digits, photos, an npz file, or a folder",
            "--data.image-size PIXELS": IMAGES["--data.image-size PIXELS"],
            "--data.num-channels N": IMAGES["--data.num-channels N"],
        },
        "Model": {
            "--block-out-channels N ...": "channels at each resolution",
            "--latent-channels N": "channels of the latents",
        },
        "Steps": {
            "--train.num-steps N": "optimizer steps",
            "--train.batch-size N": "images per step",
            "--loss NAME": "how far a reconstruction is off",
            "--kl-weight WEIGHT": "of the divergence from a standard normal",
        },
        "Output": {"--out DIR": "where the model and report.json go (required)", **SEED},
    },
    "import": {
        "Base": {
            "SOURCE": "diffusers' folder, a hub name, openai:FILE.pt or compvis:FILE.ckpt "
            "(required)",
            "OUT": "a new folder (required)",
            "--preset NAME": "the preset that it was trained with, where it does not say",
        },
        "Noise process, where it does not say": {
            "--diffusion.beta-schedule NAME": "the noise schedule",
            "--diffusion.num-train-timesteps N": "timesteps",
            "--model.num-heads N": "heads of every attention",
        },
    },
}
"""Flags by command and group; the words behind a flag name its value."""

FOUND_IN_DATA = ("image_size", "num_channels", "num_classes")
"""Settings of the preset ``images`` that are those of the images."""


def summary(command: Any) -> str:
    """Return the first line of a command's description."""
    return str(type(command).__doc__).splitlines()[0]


def short_help(name: str, command: Any) -> str | None:
    """Return the help of the flags that people use, or None where all are few.

    Args:
        name: The command's name.
        command: It, with its defaults.
    """
    groups = SHORT.get(name)
    if groups is None:
        return None
    lines = [f"usage: tdc-ray {name} [FLAGS]", summary(command)]
    for title, flags in groups.items():
        lines.append(f"{title}:")
        for flag, text in flags.items():
            details = wrap(
                text + _values(flag.split()[0], command), WIDTH - COLUMN, break_on_hyphens=False
            )
            for left, right in zip([f"  {flag}", *[""] * len(details)], details, strict=False):
                lines.append(f"{left:<{COLUMN - 1}} {right}")
    lines.append(f"All flags: tdc-ray {name} --help-all")
    return "\n".join(lines)


def _values(flag: str, command: Any) -> str:
    """Write the choices of a flag and its default, if it has one."""
    found = owner(flag, command)
    assert found is not None  # SHORT's flags are there
    holder, name = found
    taken, value = taken_by(flag, command), getattr(holder, name)
    choices = f": {', '.join(taken.choices)}" if taken and taken.choices else ""
    default = " ".join(map(str, value)) if isinstance(value, tuple) else value
    if name == "image_size":
        default = size_text(value)
    has_default = not flag.isupper() and value is not None and not isinstance(value, bool)
    if _are_found(command) and name in FOUND_IN_DATA:
        default = "the images'"
    is_given = has_default and "MISSING" not in repr(value) and value != ()
    return choices + (f" [{default}]" if is_given else "")


def _are_found(command: Any) -> bool:
    """Whether a command's images are people's own, and decide the settings that follow them."""
    config = command.config
    is_run = isinstance(config, RunConfig)
    return is_run and config.preset == "images" and config.model.base is None
