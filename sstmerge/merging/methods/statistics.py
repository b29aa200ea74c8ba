"""Statistics that methods take beside the adapters, checked once, when they are put together.

    FisherStatistics({"math": Fisher, "code": Fisher})   need "fishers": one Fisher per adapter (--fisher NAME=FILE)
    GainAndCost(gain, cost)                              need "gain_and_cost": the two Fishers of SST (--gain, --cost)
    GainAndCost(gain)                                    need "gain"
    AlignedPair(aligned, base, adapters)                 need "aligned_pair" (`sstmerge.merging.methods.aligned_pair`)

All Fishers of one merge lie in one core space, and the batches of the merge must be that space's groups: build the merge
on `statistics.space`, whose adapters carry the names given to `Fisher.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from sstmerge import batched_lu
from sstmerge.adapters import CoreSpace
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher import Fisher, Structure
from sstmerge.gevp import Spectrum, solve
from sstmerge.merging.experts import expert_spectra
from sstmerge.merging.methods.eigenspace import Eigenspace
from sstmerge.merging.methods.registry import CoreBatch
from sstmerge.merging.module_filter import module_filter
from sstmerge.merging.selection import Selection
from sstmerge.merging.sst import Rule, merge_cores

# Share of an adapter's squared norm that a space may miss: float32 bases and the rank tolerance stay far below.
_SHARE_LOST = 1e-4


@dataclass(frozen=True)
class FisherStatistics:
    """One Fisher per adapter, each from that adapter's own data.

    Attributes:
        fishers: The Fishers by adapter name, all in one core space and of one base model.

    Raises:
        FisherError: The Fishers belong to different spaces or base models, one has seen no data, or they were collected for
            a part of the adapters only.
    """

    fishers: Mapping[str, Fisher]
    # By μ; the methods ask for it group after group.
    _filtered: dict[float, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.fishers:
            raise FisherError("No Fisher was given; this method needs one per adapter (--fisher NAME=FILE).")
        first_name, first = next(iter(self.fishers.items()))
        for name, fisher in self.fishers.items():
            _check_pair(f"of '{first_name}'", first, f"of '{name}'", fisher)
        _check_whole(first.space)

    @property
    def space(self) -> CoreSpace:
        """The core space that the Fishers belong to."""
        return next(iter(self.fishers.values())).space

    def of(self, batch: CoreBatch) -> list[Fisher]:
        """Return the Fishers of a batch's adapters, in their order.

        Args:
            batch: The batch.

        Returns:
            The Fishers.

        Raises:
            FisherError: An adapter has no Fisher, a Fisher has no adapter, or the batch is not of this space.
        """
        missing = [name for name in batch.adapters if name not in self.fishers]
        unknown = [name for name in self.fishers if name not in batch.adapters]
        if missing or unknown:
            raise FisherError(
                f"This method needs one Fisher for each of the adapters {list(batch.adapters)}, but got Fishers for "
                f"{list(self.fishers)}; collect one on each adapter's own data and pass --fisher NAME=FILE."
            )
        check_batch(batch, self.space)
        return [self.fishers[name] for name in batch.adapters]

    @cached_property
    def diagonals(self) -> dict[str, Tensor]:
        """Diagonal of every Fisher in core coordinates, shape (D,), float64."""
        return {name: core_diagonal(fisher) for name, fisher in self.fishers.items()}

    def filtered(self, mu: float) -> dict[str, Tensor]:
        """Return every adapter's coordinates filtered by its gain against the others' cost, shape (D,), float64.

        Args:
            mu: Weight of the others' mean cost.
        """
        if mu not in self._filtered:
            space, selection = self.space, Selection(mu=mu)
            self._filtered[mu] = {
                name: merge_cores(spectrum, space.zero(), space.core(name), rule=Rule.WIENER, selection=selection).core
                for name, spectrum in expert_spectra(self.fishers)
            }
        return self._filtered[mu]


@dataclass(frozen=True)
class GainAndCost:
    """The Fisher of what is to be gained (harmful prompts refused) and that of what must be kept (benign prompts).

    Attributes:
        gain: F_gain.
        cost: F_cost, in the same core space; None for methods that need the gain only.

    Raises:
        FisherError: The two belong to different spaces or base models, one has seen no data, or they were collected for a
            part of the adapters only.
    """

    gain: Fisher
    cost: Fisher | None = None
    _kept: dict[float, frozenset[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_pair("of the gain", self.gain, "of the cost", self.cost or self.gain)
        _check_whole(self.gain.space)

    @property
    def space(self) -> CoreSpace:
        """The core space that the Fishers belong to."""
        return self.gain.space

    @cached_property
    def diagonal_spectrum(self) -> Spectrum:
        """λ = F_gain,ii / (F_cost,ii + ε · mean) of every core entry, with the default damping of `diagonal`."""
        return solve(as_diagonal(self.gain), as_diagonal(self._needed_cost()))

    @cached_property
    def gain_eigenspace(self) -> Eigenspace:
        """Eigenvectors of F_gain."""
        return Eigenspace(self.gain)

    def best_modules(self, share: float) -> frozenset[str]:
        """Return the modules with the largest trace(F_gain) / trace(F_cost).

        Args:
            share: Share of the modules, in (0, 1].

        Returns:
            Their paths.
        """
        if share not in self._kept:
            chosen = module_filter(as_diagonal(self.gain), as_diagonal(self._needed_cost()), modules=share)
            self._kept[share] = frozenset(chosen.layers)
        return self._kept[share]

    def _needed_cost(self) -> Fisher:
        if self.cost is None:
            raise FisherError("This method needs a cost Fisher beside the gain Fisher; pass --cost FILE.")
        return self.cost


def check_batch(batch: CoreBatch, space: CoreSpace) -> None:
    """Refuse a batch whose coordinates are not those of a Fisher's space.

    Args:
        batch: The batch.
        space: The space.

    Raises:
        FisherError: The batch has other layers or other bases.
    """
    if batch.group >= len(space.groups) or space.groups[batch.group].names != batch.names:
        raise FisherError(
            f"The Fisher was collected for other layers than those being merged (first among these: {batch.names[0]}); "
            "collect it for exactly these adapters."
        )
    group = space.groups[batch.group]
    for mine, theirs in ((batch.U, group.U), (batch.V, group.V)):
        if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=0.0, atol=1e-5):
            raise FisherError(
                f"The Fisher was collected in another basis of layer '{batch.names[0]}' than the merge uses: it belongs "
                "to other adapters, or the merge was not built on the Fisher's own space."
            )


def safety_index(batch: CoreBatch, method: str) -> int:
    """Return the index of the safety adapter.

    Args:
        batch: The batch.
        method: Name of the method, for the message.

    Returns:
        The index.

    Raises:
        InputError: The merge has no safety adapter.
    """
    if batch.safety is None:
        raise InputError(
            f"'{method}' treats one adapter as the safety adapter; name which of {list(batch.adapters)} it is."
        )
    return batch.safety


def utility_and_safety(batch: CoreBatch, method: str) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of all other adapters, and the weighted safety adapter.

    Args:
        batch: The batch.
        method: Name of the method, for the message.

    Returns:
        Cores, (L, R_o, R_i) each, float64.
    """
    index = safety_index(batch, method)
    weighted = batch.weights[:, None, None, None] * batch.cores
    return weighted.sum(dim=0) - weighted[index], weighted[index]


def core_diagonal(fisher: Fisher) -> Tensor:
    """Return the diagonal of a Fisher of any structure in core coordinates.

    Args:
        fisher: The Fisher.

    Returns:
        F_ii per response token, shape (D,), float64.
    """
    space = fisher.space
    if fisher.structure is Structure.DIAGONAL:
        return fisher.diagonal()
    if fisher.structure is Structure.GLOBAL:
        return fisher.scores().square().sum(dim=0, dtype=torch.float64)
    if fisher.structure is Structure.KFAC:
        factors = fisher.kronecker_factors()
        diagonals = [(X.diagonal(dim1=1, dim2=2), D.diagonal(dim1=1, dim2=2)) for X, D in factors]
        return space.join([output[:, :, None] * input_[:, None, :] for input_, output in diagonals])
    if fisher.structure is Structure.BLOCK:
        shapes = [group.core_shape[1:] for group in space.groups]
        blocks = zip(fisher.blocks(), shapes, strict=True)
        return space.join([block.diagonal(dim1=1, dim2=2).unflatten(1, shape) for block, shape in blocks])
    basis = fisher.kronecker_basis()
    rotated = zip(space.split(fisher.diagonal()), basis.Q, basis.P, strict=True)
    # Coordinates are Q⁻¹ C P⁻ᵀ, so an entry (a, b) of C enters (k, l) with the factor (Q⁻¹)_ka (P⁻¹)_lb.
    inverses = [(part, batched_lu.inverse(Q)[0], batched_lu.inverse(P)[0]) for part, Q, P in rotated]
    return space.join([left.square().mT @ part @ right.square() for part, left, right in inverses])


def as_diagonal(fisher: Fisher) -> Fisher:
    """Return a `diagonal` Fisher with the diagonal of one of any structure; its split halves are not kept apart.

    Args:
        fisher: The Fisher.

    Returns:
        The diagonal Fisher.
    """
    if fisher.structure is Structure.DIAGONAL:
        return fisher
    sums = fisher.space.split(core_diagonal(fisher) * fisher.tokens)
    statistics = {f"square_sum.{i}": torch.stack([part, torch.zeros_like(part)]) for i, part in enumerate(sums)}
    return replace(fisher, structure=Structure.DIAGONAL, statistics=statistics)


def _check_pair(first_label: str, first: Fisher, second_label: str, second: Fisher) -> None:
    for label, fisher in ((first_label, first), (second_label, second)):
        if not fisher.tokens > 0:
            raise FisherError(f"The Fisher {label} has seen no response token; collect it from more data.")
    if first.metadata.get("model") != second.metadata.get("model"):
        raise FisherError(
            f"The Fisher {first_label} and the Fisher {second_label} were collected on different base models; collect "
            "one of them again."
        )
    second.in_space(first.space)


def _check_whole(space: CoreSpace) -> None:
    """Refuse a space that a module filter has cut: adapters would lose what lies outside of it."""
    for adapter in space.adapters:
        whole = 0.0
        for factors in adapter.layers.values():
            A, B = factors.A.double(), factors.B.double()
            whole += factors.scaling**2 * float(((B.mT @ B) * (A @ A.mT)).sum())
        if float(space.core(adapter.name).square().sum()) < (1.0 - _SHARE_LOST) * whole:
            raise FisherError(
                f"The Fisher covers only a part of adapter '{adapter.name}' (it was collected behind a module filter), so a "
                "merge in its space would lose the rest; collect it for the whole adapters."
            )
