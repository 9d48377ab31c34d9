"""How the base is pruned: ``--prune.*``."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from tdc_ray.config.train import Precision
from tdc_ray.config.validation import NonNegativeInt, PositiveInt, refuse, require, settings

ProxyMethod = Literal["offline", "llm"]
ScoreMethod = Literal["random", "magnitude", "lamp", "taylor", "diff-pruning"]
SearchMethod = Literal[ProxyMethod, ScoreMethod]
PruneMethod = Literal[SearchMethod, "none"]
Rival = Literal[ScoreMethod, "uniform"]
Objective = Literal["macs", "latency"]
Sensitivity = Literal["second-order", "measured"]


@settings("prune")
class PruneConfig:
    """How the base is pruned to each group's limit."""

    method: PruneMethod = "offline"
    """Who proposes the schemes. offline: a search over measured sensitivities that needs no key;
    llm: a language model beside it (see proxy); random, magnitude, lamp, taylor, diff-pruning: the
    best of a uniform ratio, a global ranking and one per mac by this score, one round; none: TDC
    without pruning, every expert keeps the base's widths."""

    space: Literal["inner", "full", "depth"] = "inner"
    """What can be pruned. inner: residual blocks' inner widths and attention heads; full: the
    residual stream's width too; depth: a transformer's attentions and feed-forwards as a whole
    too, and with all of them the block."""

    channel_multiple: PositiveInt = 1
    """The channels that a pruned unit keeps are a multiple of this wherever there are so many, as
    vector units and tensor cores like them: 8 or 16, or 64; 1: any number of steps. A unit may
    always be left unpruned."""

    objective: Objective = "macs"
    """What a group's limit is a share of. macs: the base's; latency: the base's measured time, by
    a table of how long each unit takes at each width on a worker's device, which is measured once
    and kept in the run directory. It goes with the inner space."""

    latency_batch_size: PositiveInt = 16
    """Images of the forward pass whose time is measured, in float32: where latency is the
    objective, and for the report of the experts' times."""

    refit: Literal["least-squares", "none"] = "least-squares"
    """What follows pruning. least-squares: the weights that read what was pruned are fitted anew
    so that their layer outputs what the base's does; none: nothing, as in the paper."""

    memory: Literal["shared", "own"] = "shared"
    """What a group sees of the memory bank. shared: the results of all groups up to the end of the
    round before; own: its own results, without waiting for the others."""

    num_rounds: PositiveInt = 3
    """Rounds of propose, prune, refit, measure, remember (the paper's R)."""

    num_candidates: PositiveInt = 3
    """Pruning schemes per round. A language model has as many of its own measured beside them."""

    rivals: tuple[Rival, ...] = ()
    """What competes with the schemes of the offline proxy or the language model. A criterion: the
    lowest scores of all units go first, until the limit is met; uniform: every unit keeps the same
    share, of the channels that the search ranks highest. Each is a candidate more."""

    halving_steps: NonNegativeInt = 0
    """Successive halving: after the rounds the best half of the candidates is fine-tuned for this
    many steps, then the best half of those for twice as many, until one is left; 0: the lowest
    loss straight after pruning and refit wins."""

    num_images: PositiveInt = 512
    """Noised images of the group's timesteps on which scores, losses and sensitivities are
    measured."""

    num_refit_images: PositiveInt = 1024
    """Noised images of the group's timesteps from which the refit takes its statistics. Their
    activations between two blocks are held in memory."""

    sensitivity: Sensitivity = "second-order"
    """How the increase of the loss with pruned units is known. second-order: by a quadratic
    model of the loss, from a few backward passes; measured: every unit is pruned to every level
    alone, and again on models that are pruned elsewhere. Without a refit, and with streams,
    sensitivities are measured in any case."""

    num_probes: PositiveInt = 2
    """Random directions of each image, a backward pass each, that the quadratic model rests on."""

    num_levels: PositiveInt = 4
    """Widths of each unit at which its sensitivity is measured or modelled."""

    num_passes: PositiveInt = 3
    """How often sensitivities are measured, unless they are modelled. 1: on the base; 2: once more
    at the limit, on the best scheme so far; 3: half-way there too, and so on. Pruned units affect
    each other, and later passes measure that."""

    held_out_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Share of the images that no fine-tune sees, in (0, 0.5]: one half is what the losses that a
    search chooses by are measured on, the other judges what came of it."""

    held_out_of_base: bool = False
    """Whether stage 1 does not train on the images of `held_out_share` either, so that losses are
    of images that no network has seen. False: it trains on all, as in the paper."""

    precision: Precision = "fp32"
    """Precision of the forward passes that losses and sensitivities are measured by, as in
    training; pruning and refits stay in fp32."""

    batch_size: PositiveInt | None = None
    """Images per forward pass while measuring; None means as many as the device takes best, by the
    size of the model's activations."""

    @property
    def max_per_round(self) -> int:
        """Candidates of a round, at most: the offline proxy's, and a language model's own."""
        return self.num_candidates * (2 if self.method == "llm" else 1)

    @property
    def max_candidates(self) -> int:
        """Candidates of a search by a proxy, at most."""
        return self.num_rounds * self.max_per_round + len(self.rivals)

    @property
    def models_loss(self) -> bool:
        """Whether a quadratic model of the loss stands in for measured sensitivities."""
        fits = self.refit == "least-squares" and self.space != "full"
        return fits and self.sensitivity == "second-order"

    def __post_init__(self) -> None:
        distinct = len(set(self.rivals)) == len(self.rivals)
        require("prune", self, "rivals", "names, each once", ok=distinct)
        rivalled = not self.rivals or self.method in get_args(ProxyMethod)
        require("prune", self, "rivals", f"empty with prune.method {self.method}", ok=rivalled)
        searches = self.objective == "macs" or self.method != "none"
        require("prune", self, "objective", "macs with prune.method none", ok=searches)
        if self.objective == "latency" and self.space == "full":
            refuse(
                "prune.space must be inner or depth with prune.objective latency, got full: the "
                "time that a stream's width takes depends on the widths of all that read it. Use "
                "--prune.space inner, or --prune.objective macs."
            )
