"""The paths of a run directory."""

from dataclasses import dataclass
from pathlib import Path

FIRST_STAGE_DIR = "first_stage"
"""Name of the first stage's folder, beside the models that need it: experts, or an imported
base."""


class _Below:
    """Descriptor: the path of a name below a run directory."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run_dir: "RunDir", _: object) -> Path:
        return run_dir.root / self.name


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run; ``root`` is absolute, so that it means the same in every process."""

    root: Path
    given_base: Path | None = None
    """A base outside the run directory."""

    config = _Below("config.json")
    """The settings."""

    environment = _Below("environment.json")
    """Versions, commit and machine of the first start."""

    plan = _Below("plan.json")
    """The groups and their limits."""

    plan_plot = _Below("plan.png")
    """The plan as a picture."""

    base = _Below("base")
    """Output of stage 1, or of the import of a base."""

    base_result = _Below("base/result.json")
    """Result of training the base; it exists when the base is done."""

    base_training = _Below("base/training")
    """Ray Train's directory: checkpoints of stage 1."""

    latency = _Below("latency.json")
    """Times of every unit at every width, where time is limited; measured once."""

    times = _Below("times.json")
    """Times of base and experts; measured once."""

    precision = _Below("precision")
    """What was measured for precisions that are auto, by stage."""

    step_times = _Below("step_times")
    """Times of training steps, by which ``--hours`` chose how many there are."""

    memory = _Below("memory.jsonl")
    """The memory bank."""

    transcripts = _Below("proxy")
    """Requests to a language model, and its replies."""

    experts = _Below("experts")
    """The folder that ``ProgressivePipeline.from_pretrained`` loads."""

    samples = _Below("evaluation")
    """Images that the base and the experts were scored on, and their features' moments."""

    features = _Below("evaluation/features.json")
    """The features that the run is scored on: chosen once, at its first start."""

    real_images = _Below("evaluation/real.npz")
    """Some of the training images, to be shown beside samples."""

    reference = _Below("evaluation/reference.npz")
    """Mean and covariance of the features that the images are compared with."""

    comparison = _Below("comparison")
    """Of the base trained on: its checkpoint while it trains, and its losses beside TDC's."""

    longer_base = _Below("comparison/unet")
    """The base trained on, with its averaged weights, as diffusers saves it."""

    tensorboard = _Below("tensorboard")
    """Event files."""

    loggers = _Below("loggers.json")
    """Ids of the runs that trackers keep of this one, by the trackers' names."""

    timeline = _Below("timeline.jsonl")
    """The timeline: which worker ran which item, when."""

    timeline_plot = _Below("timeline.png")
    """The same as a picture."""

    trace = _Below("trace.json")
    """The same for Perfetto."""

    log = _Below("run.log")
    """The log of all attempts."""

    results = _Below("results.json")
    """The results."""

    @property
    def base_unet(self) -> Path:
        """The base with its averaged weights, as diffusers saves it."""
        return self.given_base or self.base / "unet"

    def grid(self, model: str) -> Path:
        """Return the path of the picture of some images that a model was scored on."""
        return self.root / f"samples-{model}.png"

    def expert(self, index: int) -> Path:
        """Return the path of a group's expert, by the group's index."""
        return self.experts / f"expert-{index:02d}"

    def group(self, index: int) -> Path:
        """Return the folder of a group's scores, losses of candidates and checkpoints."""
        return self.root / "groups" / f"{index:02d}"

    def error_weights(self, index: int) -> Path:
        """Return the path of the image weights in the refits of a group."""
        return self.group(index) / "error-weights.safetensors"
