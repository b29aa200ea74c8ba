"""Choosing modules and rank dimensions on a small pilot sample, so that the rest is never collected.

A "VILA-style identification", but with this package's two Fishers: modules and basis vectors are ranked by the ratio of
their gain trace to their cost trace. (VILA itself ranks nothing by layer; see https://arxiv.org/abs/2508.21300.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sstmerge.adapters import CoreSpace
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher import Fisher, Structure


@dataclass(frozen=True)
class ModuleFilter:
    """What a pilot chose.

    Attributes:
        space: The chosen part of the space.
        layers: Module paths that are kept, best first.
        efficiency: Gain trace per cost trace of every module of the pilot.
        dropped_lambda: Share of Σ λ over all core entries of the pilot that was left out.
        dropped_gain: Share of the pilot's gain trace that was left out.
    """

    space: CoreSpace
    layers: tuple[str, ...]
    efficiency: dict[str, float]
    dropped_lambda: float
    dropped_gain: float

    def sentence(self) -> str:
        """Say what was left out."""
        return (
            f"The module filter kept {len(self.layers)} of {len(self.efficiency)} modules; on its pilot it drops "
            f"{self.dropped_lambda:.0%} of the sum of \u03bb and {self.dropped_gain:.0%} of the gain."
        )


def module_filter(gain: Fisher, cost: Fisher, *, modules: float, dimensions: float = 1.0) -> ModuleFilter:
    """Rank modules and basis vectors by gain trace per cost trace, and keep the best.

    Args:
        gain: `diagonal` Fisher of a pilot of harmful prompts.
        cost: `diagonal` Fisher of a pilot of benign prompts, in the same space.
        modules: Share of the modules that is kept, in (0, 1].
        dimensions: Share of the output and of the input basis vectors of every kept module, in (0, 1].

    Returns:
        The part of the space, and how much of the pilot it leaves out.

    Raises:
        InputError: If a share is out of range.
        FisherError: If the Fishers are not diagonal, or the pilot has no gain.
    """
    for name, share in (("modules", modules), ("dimensions", dimensions)):
        if not 0.0 < share <= 1.0:
            raise InputError(f"{name} must lie in (0, 1], but is {share}.")
    if gain.structure is not Structure.DIAGONAL or cost.structure is not Structure.DIAGONAL:
        raise FisherError(
            f"A module filter takes 'diagonal' pilots, but got '{gain.structure}' and '{cost.structure}'."
        )
    space = gain.space
    cost = cost.in_space(space)
    gains, costs = gain.diagonal(), cost.diagonal()
    if not float(gains.sum()) > 0:
        raise FisherError("The pilot's gain is zero everywhere; give it more harmful prompts.")
    ratio = _ratio(space.layer_sums(gains), space.layer_sums(costs))
    order = torch.argsort(ratio, descending=True, stable=True)[: math.ceil(modules * len(ratio))]
    names = space.layer_names
    kept = tuple(names[i] for i in order.tolist())
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    mask = [torch.zeros_like(part) for part in space.split(gains)]
    for group, gain_part, cost_part, chosen in zip(
        space.groups, space.split(gains), space.split(costs), mask, strict=True
    ):
        for i, name in enumerate(group.names):
            if name not in kept:
                continue
            outputs[name] = _best(_ratio(gain_part[i].sum(dim=1), cost_part[i].sum(dim=1)), dimensions)
            inputs[name] = _best(_ratio(gain_part[i].sum(dim=0), cost_part[i].sum(dim=0)), dimensions)
            chosen[i][outputs[name][:, None], inputs[name][None, :]] = 1.0
    inside = space.join(mask)
    efficiency = _ratio(gains, costs)
    return ModuleFilter(
        space=space.restrict(outputs, inputs),
        layers=kept,
        efficiency=dict(zip(names, ratio.tolist(), strict=True)),
        dropped_lambda=1.0 - float((efficiency * inside).sum() / efficiency.sum()),
        dropped_gain=1.0 - float((gains * inside).sum() / gains.sum()),
    )


def _ratio(gains: Tensor, costs: Tensor) -> Tensor:
    """Return gain per cost, with costs lifted by a hundredth of their mean (relative, as everywhere)."""
    return gains / (costs + 0.01 * costs.mean() + torch.finfo(costs.dtype).tiny)


def _best(ratio: Tensor, share: float) -> Tensor:
    """Return the indices of the best entries, in rising order."""
    count = math.ceil(share * len(ratio))
    return torch.argsort(ratio, descending=True, stable=True)[:count].sort().values
