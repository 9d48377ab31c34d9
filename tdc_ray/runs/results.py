"""``results.json``: the results of a run. One model, with a version, that all readers share.

Pydantic checks values that are read, not new ones: it would write 0.0 where an empty sum is 0.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from tdc_ray.data.summary import ImagesSummary
from tdc_ray.errors import StorageError
from tdc_ray.execution.timeline import WorkerUsage
from tdc_ray.storage.files import read_json, write_json
from tdc_ray.storage.object_store import display_path

T = TypeVar("T")

SCHEMA_VERSION = 1

HELD_OUT_LOSS = "held_out_loss"
"""The metric where no image is scored: the denoising loss over all timesteps alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelResult:
    """The base, or the experts together."""

    score: float
    """The metric; lower is better."""

    macs: float
    """Macs of one denoising step for one image; of experts the mean over the sampling steps."""

    num_params: float
    """Parameters at work in a step; of experts the mean over the sampling steps."""

    train_steps: int
    """Optimizer steps of this run: 0 of a pretrained base; of TDC those of base and experts."""

    train_macs: float
    """3 x macs x images seen, summed over the base (a pretrained one counts 0: its training is not
    known) and, for TDC, all experts."""

    images_per_second: float
    """Images sampled per second by one worker."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Scores beside the metric, by their names: ``kid`` or ``kd_...`` (lower is better), and
    ``precision...`` and ``recall...`` (higher)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedBaseResult:
    """Where a pretrained base came from."""

    source: str
    """As it was named: a folder, a run directory, a name on the hub, a checkpoint file."""

    files: Mapping[str, str]
    """SHA-256 of the files that hold its weights, by their paths."""

    weights: str
    """Which weights they are, such as EMA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanResult:
    """How the timesteps were grouped."""

    k: float
    num_groups: int
    """Groups asked for (the paper's N); ``groups`` holds those that remain."""

    schedule: str
    mean_macs_limit: float
    """Mean over the sampling steps of the groups' limits, in macs."""

    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupResult:
    """One group and its expert."""

    index: int
    timesteps: tuple[int, int]
    """First and last, both included."""

    macs_limit: int
    """The base's macs where time is limited instead."""

    macs: int
    num_params: int
    widths: Mapping[str, int]
    """Channel groups or heads that each unit keeps."""

    loss_base: float
    """Loss of the base on held-out noise of the group's timesteps; so all losses here."""

    loss_cut: float
    """Loss straight after pruning."""

    loss_refit: float | None
    """Loss after the refit. None means that there was none."""

    loss_finetuned: float

    source: str = "unknown"
    """Who proposed the scheme: ``offline``, ``llm``, ``llm/repaired`` where some of the language
    model's changes did not count in full, a score and its use, or ``base`` (not pruned)."""

    milliseconds_limit: float | None = None
    """Limit of a forward pass's time. None means that macs are limited."""

    milliseconds: float | None = None
    """Time of the expert's forward pass, by the table of the units' times."""

    train_steps: int | None = None
    """Steps of the fine-tune; None in results of older versions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneResult:
    """The cost of the search for sub-models."""

    method: str
    rounds: int
    """Rounds per group; 0 without pruning."""

    candidates: int
    """Schemes per round; a group that has no more measures fewer."""

    seconds: float
    """Time of computing, summed over workers."""

    search_macs: float
    """Macs of scores, sensitivities, refits, measurements and drawing; not part of
    ``train_macs``."""

    prompt_tokens: int
    completion_tokens: int

    proxy_cost: float = 0.0
    """Price of the language model's calls, in the currency of ``proxy``'s prices."""

    schemes: Mapping[str, int] = field(default_factory=dict)
    """How many schemes were measured by who proposed them, as ``source`` of a group; empty in
    results of older versions."""

    drawing_macs: float = 0.0
    """Macs of the images that were drawn from the base in place of a data set, a part of
    ``search_macs``; counted also where they were in the cache."""

    proxy_seconds: float = 0.0
    """Time of proposing schemes, or of waiting for a language model, summed over groups."""

    refit: str = "none"
    space: str = "inner"
    objective: str = "macs"
    """What is limited: ``macs``, or ``latency``."""

    notes: tuple[str, ...] = ()
    """Deviations from the settings, such as an offline proxy that replaced another, and what a
    language model contributed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """Everything that a score depends on beside the models."""

    sampler: str
    num_inference_steps: int
    eta: float
    seed: int
    num_images: int
    """Images sampled from each model."""

    reference: str
    """What the images are compared with; of held-out losses the images that they are of."""

    features: str
    """The extractor of the features; ``none`` where no image is scored."""

    weights: str
    """The weights that were sampled from."""

    num_features: int | None = None
    """Features of an image. None where no image is scored, and in results of older versions."""

    precision: str = "fp32"
    """Precision of the denoisers' weights and computation."""

    num_classes: int | None = None
    """Classes that the models are conditioned on. None means that they are unconditional."""

    labels: str | None = None
    """Assignment of classes to images."""

    guidance_scale: float = 1.0
    """Weight of classifier-free guidance; other than 1, every step takes two forward passes."""

    other_metrics: str | None = None
    """How the scores beside the metric are computed; None where there are none."""

    first_stage: str | None = None
    """Digest of the frozen first stage that decoded the images; None in pixel space."""


def few_images_note(num_images: int, num_features: int) -> str | None:
    """Write what scores of so many images suffer from, if they are too few."""
    if num_images > num_features:
        return None
    return (
        f"{num_images} images are too few for the covariance of {num_features} features: the "
        "score is far above that of more images"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSeconds:
    """Time by stage; all but ``wall`` are summed over workers."""

    base: float
    prune: float
    finetune: float
    evaluate: float
    wall: float
    """Time of the attempt that finished the run, from start to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimesResult:
    """How long a forward pass takes, as one worker measured it after the fine-tunes."""

    device: str
    batch_size: int
    """Images of the pass; its numbers are float32."""

    base_ms: float
    """Milliseconds of the base."""

    experts_ms: tuple[float, ...]
    """Milliseconds of the experts, in the order of the groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseResult:
    """What was computed for a run, and what was loaded from a cache; macs as elsewhere here."""

    items_computed: int
    items_reused: int
    train_macs_computed: float
    train_macs_reused: float
    search_macs_computed: float
    search_macs_reused: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LossDifference:
    """Denoising losses of TDC and of what it is compared with, on the same images and noise.

    The images are held out: no fine-tune and no choice of the search has seen them, and a base
    that is trained on for the comparison does not.
    """

    loss_tdc: float
    loss_base: float
    difference: float
    """TDC's minus the base's: below 0 TDC is better."""

    low: float
    high: float
    """The difference's 95 % interval, paired by image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupDifference(LossDifference):
    """The same on the timesteps of a group."""

    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapResult:
    """The base trained on with one group's expert put in."""

    index: int
    """Of the group."""

    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonResult:
    """The base trained on by all that TDC spent beyond stage 1, beside TDC."""

    kind: str
    """``equal-macs``"""

    score: float
    """As of base and TDC: of images from the same noise."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """As of base and TDC."""

    train_macs: float
    """Of all its training, that of stage 1 included: what training and search of TDC took, rounded
    up to a whole step."""

    steps: int
    """Optimizer steps, those of stage 1 included."""

    continued: bool
    """Whether its optimizer went on from stage 1's last checkpoint, or started afresh since there
    was none."""

    seconds: float
    """What training it on took."""

    num_images: int
    """Images that the losses are of."""

    num_noised: int
    """Noised images of each group: all times that one of these was noised."""

    seen_by_base: bool | None = None
    """Whether stage 1 was trained on these images; None for a base that was given, and in results
    of older versions."""

    mean: LossDifference
    """Over all timesteps alike."""

    groups: tuple[GroupDifference, ...]
    swaps: tuple[SwapResult, ...] = ()
    """Empty where they were not asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The whole of ``results.json``."""

    version: int = SCHEMA_VERSION
    preset: str
    seed: int
    dataset: str
    metric: str
    """``fid`` for Inception's features and nothing else; ``held_out_loss`` without features."""

    base: ModelResult
    tdc: ModelResult
    plan: PlanResult
    groups: tuple[GroupResult, ...]
    prune: PruneResult
    evaluation: EvaluationResult
    seconds: StageSeconds
    versions: Mapping[str, str]
    commit: str | None
    given_base: PretrainedBaseResult | None = None
    """None means that the run trained its base."""

    workers: tuple[WorkerUsage, ...] = ()
    """How well the workers were used, phase by phase, over all attempts at the run."""

    reuse: ReuseResult | None = None
    """None means that the run shared no cache: all was computed for it."""

    times: TimesResult | None = None
    """None means that the run is of a version that did not measure it."""

    comparison: ComparisonResult | None = None
    """None means that it was not asked for."""

    losses: LossDifference | None = None
    """Of TDC and the base, which are their scores; None where images are scored."""

    images: ImagesSummary | None = None
    """Which images were learnt, and what was done to them; None in results of older versions."""


_ADAPTER = TypeAdapter(Results)


def score_text(score: float) -> str:
    """Format a score: with three decimals, and losses, which are below 1, with four digits."""
    return f"{score:#.4g}" if abs(score) < 1 else f"{score:.3f}"


def save_results(path: Path, results: Results) -> None:
    """Write the results as JSON."""
    write_json(path, asdict(results))


def load_results(path: Path) -> Results:
    """Load what :func:`save_results` wrote.

    Raises:
        StorageError: The file is missing, or of another schema.
    """
    return load_checked(path, _ADAPTER, "version", SCHEMA_VERSION)


def load_checked(path: Path, adapter: TypeAdapter[T], key: str, version: int) -> T:
    """Load a JSON file whose ``key`` holds a version.

    Raises:
        StorageError: The file is missing, of another version, or does not fit the type.
    """
    document = read_json(path)
    found = document.get(key) if isinstance(document, dict) else None
    if found != version:
        raise StorageError(f"{display_path(path)} has {key} {found}, expected {version}.")
    try:
        return adapter.validate_python(document, extra="forbid")
    except ValidationError as error:
        raise StorageError(
            f"{display_path(path)} is no {path.name} of {key} {version}: {error}"
        ) from error


def comparable(results: Results) -> dict[str, Any]:
    """Return what a repeated run must reproduce: no times, rates, reuse, versions, commit."""
    document = asdict(results)
    for model in ("base", "tdc"):
        del document[model]["images_per_second"]
    del document["prune"]["seconds"], document["prune"]["proxy_seconds"], document["seconds"]
    del document["versions"], document["commit"], document["workers"]
    del document["reuse"], document["times"]
    if document["comparison"] is not None:
        del document["comparison"]["seconds"]
    return document
