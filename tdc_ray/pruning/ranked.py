"""What pruned models are compared by, for every kind of record of their losses."""


class Ranked:
    """Losses of a pruned model; its records derive from this."""

    __slots__ = ()

    loss_cut: float
    loss_refit: float | None
    distance: float | None

    @property
    def loss(self) -> float:
        """The loss that counts: after the refit, or after pruning without one."""
        return self.loss_cut if self.loss_refit is None else self.loss_refit

    @property
    def ranks_by_loss(self) -> bool:
        """Whether `rank` is the loss; else it is the distance."""
        return self.loss_refit is None or self.distance is None

    @property
    def rank(self) -> float:
        """What models are compared by, the lowest first; see :mod:`tdc_ray.pruning.race`."""
        return self.loss if self.loss_refit is None or self.distance is None else self.distance
