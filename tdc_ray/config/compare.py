"""What TDC is compared with: ``--compare``, and ``--compare.*``."""

from typing import Annotated, Literal

from tyro.conf import arg

from tdc_ray.config.validation import PositiveInt, require, settings

Comparison = Literal["none", "equal-macs"]


@settings("compare")
class CompareConfig:
    """What TDC is compared with beside its base.

    None of it changes what TDC computes, so a finished run can be compared later.
    """

    kind: Annotated[Comparison, arg(aliases=("--compare",))] = "none"
    """equal-macs: the base is also trained on by as many macs as TDC spent beyond stage 1, search
    included, and scored; none: the base alone is scored beside TDC."""

    num_images: PositiveInt = 4096
    """Noised images of each group on which the losses of TDC and of the base trained on are
    compared, rounded up so that every image is seen equally often. The images are half of
    `prune.held_out_share`: those that no fine-tune and no choice of the search has seen."""

    swaps: bool = False
    """Score the base trained on with one group's expert put in, too, for every group: which groups
    gain, and which lose. Samples as many images again for every group."""

    def __post_init__(self) -> None:
        known = not self.swaps or self.kind != "none"
        require("compare", self, "swaps", "False with compare.kind none", ok=known)
