from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.scores import select_top


def test_the_highest_scores_are_kept_in_rising_order_and_the_first_of_equals():
    unit = Unit("block", "residual", width=4, channels=1, pixels=1)
    scores = {"block": [1.0, 3.0, 2.0, 3.0]}
    chosen = [select_top((unit,), scores, {"block": width})["block"] for width in (1, 2, 3, 4)]
    assert chosen == [(1,), (1, 3), (1, 2, 3), (0, 1, 2, 3)]
