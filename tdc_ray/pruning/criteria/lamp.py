"""LAMP: magnitude that can be compared between layers (Lee et al., arXiv:2010.07611)."""

from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.magnitude import magnitude_scores
from tdc_ray.pruning.criteria.scores import Scores


def lamp_scores(network: Denoiser, units: tuple[Unit, ...]) -> Scores:
    """Score by a group's or head's share in the squared magnitude of those not smaller.

    The paper scores single weights, ``w[u]^2 / sum of w[v]^2`` over all v of the layer that are
    not smaller (equation 4). Here a unit takes the place of a layer, and a group or head with all
    its weights in all layers the place of a weight: its squared magnitude is that of
    :func:`~tdc_ray.pruning.criteria.magnitude.magnitude_scores`, as in Torch-Pruning's structured
    form. Within a unit the order is magnitude's; between units it differs. The largest of every
    unit has a score of 1, so that no ranking of all units cuts one of them whole.
    """
    return {name: _shares(values) for name, values in magnitude_scores(network, units).items()}


def _shares(squared: list[float]) -> list[float]:
    """Divide each value by the sum of those that are not smaller, itself included; 0 stays 0."""
    return [
        value / sum(other for other in squared if other >= value) if value else 0.0
        for value in squared
    ]
