"""Where things are in a run directory."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run; ``root`` is absolute, so that it means the same in every process."""

    root: Path
    given_base: Path | None = None
    """A base that lies elsewhere."""

    @property
    def config(self) -> Path:
        """The settings."""
        return self.root / "config.json"

    @property
    def environment(self) -> Path:
        """Versions, commit and machine of the first start."""
        return self.root / "environment.json"

    @property
    def plan(self) -> Path:
        """The groups and their limits."""
        return self.root / "plan.json"

    @property
    def plan_plot(self) -> Path:
        """The plan as a picture."""
        return self.root / "plan.png"

    @property
    def base(self) -> Path:
        """What stage 1 leaves, or the import of a base in its place."""
        return self.root / "base"

    @property
    def base_unet(self) -> Path:
        """The base with its averaged weights, as diffusers saves it."""
        return self.given_base or self.base / "unet"

    @property
    def base_result(self) -> Path:
        """What training the base took; it exists when the base is done."""
        return self.base / "result.json"

    @property
    def base_training(self) -> Path:
        """Ray Train's directory: checkpoints of stage 1."""
        return self.base / "training"

    @property
    def latency(self) -> Path:
        """How long every unit takes at every width, where time is limited; measured once."""
        return self.root / "latency.json"

    @property
    def times(self) -> Path:
        """How long base and experts take; measured once."""
        return self.root / "times.json"

    @property
    def memory(self) -> Path:
        """The memory bank."""
        return self.root / "memory.jsonl"

    @property
    def transcripts(self) -> Path:
        """What was asked of a language model, and what it answered."""
        return self.root / "proxy"

    @property
    def experts(self) -> Path:
        """What ``ProgressivePipeline.from_pretrained`` loads."""
        return self.root / "experts"

    def expert(self, index: int) -> Path:
        """The expert of a group, by the group's index."""
        return self.experts / f"expert-{index:02d}"

    @property
    def samples(self) -> Path:
        """Images that the base and the experts were scored on, and their features' moments."""
        return self.root / "evaluation"

    @property
    def features(self) -> Path:
        """Which features the run is scored on: decided once, at its first start."""
        return self.samples / "features.json"

    @property
    def reference(self) -> Path:
        """Mean and covariance of the features that the images are held against."""
        return self.samples / "reference.npz"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def timeline(self) -> Path:
        """Who ran what, when."""
        return self.root / "timeline.jsonl"

    @property
    def timeline_plot(self) -> Path:
        """The same as a picture."""
        return self.root / "timeline.png"

    @property
    def log(self) -> Path:
        """The log of all attempts."""
        return self.root / "run.log"

    @property
    def results(self) -> Path:
        """What came out."""
        return self.root / "results.json"

    def group(self, index: int) -> Path:
        """What stage 2 leaves of a group: scores, losses of candidates, checkpoints."""
        return self.root / "groups" / f"{index:02d}"

    def error_weights(self, index: int) -> Path:
        """How much every image counts in the refits of a group."""
        return self.group(index) / "error-weights.safetensors"
