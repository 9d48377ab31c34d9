"""A pruning task on the tiny UNet, for tests of proxies."""

from dataclasses import replace
from typing import Any

from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.proxy import ProposalRequest
from tdc_ray.pruning.space import Scheme, space_of

SPACE = space_of(architecture("tiny"))
NAMES = [unit.name for unit in SPACE.units]

TASK = ProposalRequest(
    space=SPACE,
    group=2,
    timesteps=(200, 299),
    snr_db=(3.5, -1.25),
    limit=round(0.7 * SPACE.macs_base),
    loss_base=0.05,
    scores={unit.name: [float(n + 1) for n in range(unit.width)] for unit in SPACE.units},
    sensitivities={unit.name: {1: 0.01} for unit in SPACE.units},
    num_candidates=2,
    round=1,
    num_rounds=3,
    seed=0,
)


def entry(group: int, loss: float, *, candidate: int = 0, **widths: int) -> MemoryEntry:
    """An entry that cuts units, given by their number as ``u0=3``."""
    scheme = SPACE.full | {NAMES[int(name[1:])]: width for name, width in widths.items()}
    return MemoryEntry(
        group=group,
        round=0,
        candidate=candidate,
        source="llm",
        widths=scheme,
        macs=SPACE.macs(scheme),
        num_params=1,
        loss_cut=loss,
    )


def task(**changes: Any) -> ProposalRequest:
    return replace(TASK, **changes)


def is_legal(scheme: Scheme) -> bool:
    return scheme.keys() == SPACE.full.keys() and all(
        type(scheme[unit.name]) is int and 1 <= scheme[unit.name] <= unit.width
        for unit in SPACE.units
    )
