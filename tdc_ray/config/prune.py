"""The settings of pruning and of the language model that may propose for it."""

from dataclasses import dataclass
from typing import Literal

from tdc_ray.config.train import Precision
from tdc_ray.config.validation import at_least, require
from tdc_ray.errors import ConfigError

ProxyMethod = Literal["offline", "llm"]
ScoreMethod = Literal["random", "magnitude", "taylor", "diff-pruning"]
SearchMethod = Literal[ProxyMethod, ScoreMethod]
PruneMethod = SearchMethod | Literal["none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneConfig:
    """How the base is pruned to each group's limit."""

    method: PruneMethod = "offline"
    """Who proposes the schemes. offline: a search over measured sensitivities that needs no key;
    llm: a language model (see proxy); random, magnitude, taylor, diff-pruning: the best of a
    uniform ratio, a global ranking and one per mac by this score, one round; none: TDC without
    pruning, every expert keeps the base's widths."""

    space: Literal["inner", "full"] = "inner"
    """What can be cut. inner: residual blocks' inner widths and attention heads; full: the
    residual stream's width too."""

    channel_multiple: int = 1
    """The channels that a cut unit keeps are a multiple of this wherever there are so many, as
    vector units and tensor cores like them: 8 or 16, or 64; 1: any number of steps. A unit may
    always be left whole."""

    objective: Literal["macs", "latency"] = "macs"
    """What a group's limit is a share of. macs: the base's; latency: the base's measured time, by
    a table of how long each unit takes at each width on a worker's device, which is measured once
    and kept in the run directory. It goes with the inner space."""

    latency_batch_size: int = 16
    """Images of the forward pass whose time is measured, in float32: where latency is the
    objective, and for the report of what the experts take."""

    refit: Literal["least-squares", "none"] = "least-squares"
    """What follows a cut. least-squares: the weights that read what was cut are fitted anew so
    that their layer gives out what the base's does; none: nothing, as in the paper."""

    memory: Literal["shared", "own"] = "shared"
    """What a group sees of the memory bank. shared: what all groups had found by the end of the
    round before; own: what it found itself, without waiting for the others."""

    num_rounds: int = 3
    """Rounds of propose, cut, refit, measure, remember (the paper's R)."""

    num_candidates: int = 3
    """Pruning schemes per round."""

    halving_steps: int = 0
    """Successive halving: after the rounds the best half of the candidates is fine-tuned for this
    many steps, then the best half of those for twice as many, until one is left; 0: the lowest
    loss straight after cut and refit wins."""

    num_images: int = 512
    """Noised images of the group's timesteps on which scores, losses and sensitivities are
    measured."""

    num_refit_images: int = 1024
    """Noised images of the group's timesteps from which the refit takes its statistics. Their
    activations between two blocks are held in memory."""

    num_levels: int = 4
    """Widths of each unit at which its sensitivity is measured."""

    num_passes: int = 3
    """How often sensitivities are measured. 1: on the base; 2: once more at the limit, on the best
    scheme so far; 3: half-way there too, and so on. Cuts disturb each other, and the later passes
    see it."""

    held_out_share: float = 0.1
    """Share of the images that no fine-tune sees and on which all losses are measured, in
    (0, 0.5]."""

    precision: Precision = "fp32"
    """Of the forward passes that losses and sensitivities are measured by, as in training; cuts
    and refits stay in fp32."""

    batch_size: int | None = None
    """Images per forward pass while measuring; None: as many as the device takes best, by the size
    of the model's activations."""

    def __post_init__(self) -> None:
        counts = ("num_rounds", "num_candidates", "num_images", "num_refit_images")
        sizes = ("channel_multiple", "latency_batch_size", "batch_size")
        at_least(1, "prune", self, *counts, "num_levels", "num_passes", *sizes)
        at_least(0, "prune", self, "halving_steps")
        require("prune", self, "held_out_share", "in (0, 0.5]", ok=0 < self.held_out_share <= 0.5)
        searches = self.objective == "macs" or self.method != "none"
        require("prune", self, "objective", "macs with prune.method none", ok=searches)
        if self.objective == "latency" and self.space != "inner":
            raise ConfigError(
                f"prune.space must be inner with prune.objective latency, got {self.space}: the "
                "time that a stream's width takes depends on the widths of all that read it. Use "
                "--prune.space inner, or --prune.objective macs."
            )
