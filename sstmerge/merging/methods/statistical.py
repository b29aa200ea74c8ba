"""Methods that weigh adapters by statistics of their data: Fisher merging, RegMean, and masks of Fisher ratios.

All of them act on cores, in orthonormal bases, so that no result depends on how a weight change is split into factors.
The base model cancels out of every average: Σ F_t (θ_0 + Δ_t) / Σ F_t = θ_0 + Σ F_t Δ_t / Σ F_t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sstmerge.errors import FisherError, InputError, SolverError
from sstmerge.fisher import Fisher, Structure
from sstmerge.merging.methods.kronecker_solve import KroneckerSum, solve_kronecker_sum
from sstmerge.merging.methods.registry import CoreBatch, Method, Option
from sstmerge.merging.methods.statistics import FisherStatistics, GainAndCost, check_batch, utility_and_safety

_DAMPED_STRUCTURES = (Structure.DIAGONAL, Structure.KFAC, Structure.BLOCK)


def fisher_diagonal(
    batch: CoreBatch, statistics: FisherStatistics, *, normalize: bool, floor: float, scale: float
) -> Tensor:
    """Return scale · Σ λ_t F_t ∘ C_t / Σ λ_t F_t, with the diagonals of the adapters' Fishers.

    Args:
        batch: The layers.
        statistics: One Fisher per adapter.
        normalize: Divide each Fisher by its L2 norm over all layers.
        floor: Least value of a Fisher entry, as a share of the root mean square of the entries.
        scale: Factor of the result.

    Returns:
        Cores, shape (L, R_o, R_i), float64.

    Raises:
        FisherError: A Fisher is zero everywhere.
    """
    shares = _shares(batch, "fisher_diagonal")
    statistics.of(batch)
    weights = []
    for share, name in zip(shares, batch.adapters, strict=True):
        diagonal = statistics.diagonals[name]
        norm = diagonal.norm()
        if not norm > 0:
            raise FisherError(
                f"The Fisher of '{name}' is zero everywhere; collect it from data that reach the adapter."
            )
        lifted = diagonal.clamp_min(floor * float(norm) / len(diagonal) ** 0.5)
        part = statistics.space.split(lifted)[batch.group]
        weights.append(share * part / (norm if normalize else 1.0))
    stacked = torch.stack(weights)
    return scale * (stacked * batch.cores).sum(dim=0) / stacked.sum(dim=0)


def fisher_full(
    batch: CoreBatch, statistics: FisherStatistics, *, normalize: bool, damping: float, scale: float
) -> Tensor:
    """Return scale · (Σ λ_t F_t)⁻¹ Σ λ_t F_t c_t, with the whole matrix of every layer.

    Every F_t is damped on both sides of the formula (F_t + damping · mean diagonal · I; for `kfac` its factors, by the
    square root), so that the result goes from Fisher merging to the weighted average as the damping grows, and one
    adapter comes back unchanged.

    Args:
        batch: The layers.
        statistics: One Fisher per adapter, all of the structure `diagonal`, `kfac` or `block`.
        normalize: Divide each Fisher by its Frobenius norm over all layers.
        damping: Relative damping.
        scale: Factor of the result.

    Returns:
        Cores, shape (L, R_o, R_i), float64.

    Raises:
        SolverError: The damped Fishers of a layer are singular together.
    """
    shares = _shares(batch, "fisher_full")
    fishers = statistics.of(batch)
    structure = _common_structure(fishers, batch.adapters)
    if normalize:
        shares = [share / _frobenius_norm(f, n) for share, f, n in zip(shares, fishers, batch.adapters, strict=True)]
    if structure is Structure.KFAC:
        return scale * _solve_kfac(batch, fishers, shares, damping)
    if structure is Structure.BLOCK:
        return scale * _solve_block(batch, fishers, shares, damping)
    total, weighted = torch.zeros_like(batch.cores[0]), torch.zeros_like(batch.cores[0])
    for share, fisher, core in zip(shares, fishers, batch.cores, strict=True):
        part = fisher.space.split(fisher.diagonal())[batch.group]
        damped = share * (part + damping * part.mean(dim=(1, 2), keepdim=True))
        total, weighted = total + damped, weighted + damped * core
    if not bool((total > 0).all()):
        raise SolverError(_unseen(batch, int((total <= 0).flatten(1).any(dim=1).nonzero()[0]), damping))
    return scale * weighted / total


def regmean(batch: CoreBatch, statistics: FisherStatistics, *, off_diagonal: float, scale: float) -> Tensor:
    """Return scale · (Σ λ_t C_t X_t) (Σ λ_t X_t)⁻¹, with X_t = E[x̃ x̃ᵀ] of the inputs that adapter t sees.

    Args:
        batch: The layers.
        statistics: One `kfac` or `ekfac` Fisher per adapter, collected with weight sharing `expand`.
        off_diagonal: Factor of the off-diagonal entries of every X_t.
        scale: Factor of the result.

    Returns:
        Cores, shape (L, R_o, R_i), float64.

    Raises:
        FisherError: A Fisher has no input covariance.
        SolverError: The covariances together are singular.
    """
    shares = _shares(batch, "regmean")
    gram = torch.zeros(len(batch.names), *(batch.cores.shape[-1:] * 2), dtype=torch.float64)
    weighted = torch.zeros_like(batch.cores[0])
    fishers = statistics.of(batch)
    for name, fisher in zip(batch.adapters, fishers, strict=True):
        if fisher.structure not in (Structure.KFAC, Structure.EKFAC):
            raise FisherError(
                f"RegMean needs input covariances, which a '{fisher.structure}' Fisher (of '{name}') does not keep; "
                "collect it with --structure kfac."
            )
        if fisher.metadata.get("weight_sharing", "expand") != "expand":
            raise FisherError(
                f"The Fisher of '{name}' keeps covariances of mean inputs (weight sharing 'reduce'), but RegMean needs "
                "those of all positions; collect it with weight sharing 'expand'."
            )
    for share, fisher, core in zip(shares, fishers, batch.cores, strict=True):
        X = fisher.kronecker_factors()[batch.group][0]
        shrunk = share * (off_diagonal * X + (1 - off_diagonal) * torch.diag_embed(X.diagonal(dim1=1, dim2=2)))
        gram, weighted = gram + shrunk, weighted + core @ shrunk
    factor, info = torch.linalg.cholesky_ex(gram)
    if bool((info != 0).any()):
        name = batch.names[int((info != 0).nonzero()[0])]
        raise SolverError(
            f"The input covariances of layer '{name}' are singular together: the data never use some direction of its "
            "inputs. Collect more data, or shrink the off-diagonal entries (off_diagonal below 1)."
        )
    solution: Tensor = torch.cholesky_solve(weighted.mT, factor).mT
    return scale * solution


def sst_experts(batch: CoreBatch, statistics: FisherStatistics, *, mu: float) -> Tensor:
    """Return Σ_t w_t P_t c_t, where P_t filters by the gain F_t against the others' mean Fisher (`merge_experts`).

    Args:
        batch: The layers, at least two adapters.
        statistics: One Fisher per adapter, each collected at its own adapter.
        mu: Weight of the others' cost; 0 gives the weighted sum.

    Returns:
        Cores, shape (L, R_o, R_i), float64.

    Raises:
        InputError: There is one adapter only, or the Fishers were taken at points that are not their own adapters.
    """
    if len(batch.adapters) < 2:
        raise InputError("'sst_experts' filters each adapter by what it costs the others, so it needs at least two.")
    statistics.of(batch)
    filtered = statistics.filtered(mu)
    parts = [statistics.space.split(filtered[name])[batch.group] for name in batch.adapters]
    return (batch.weights[:, None, None, None] * torch.stack(parts)).sum(dim=0)


def fisher_ratio_mask(
    batch: CoreBatch, statistics: GainAndCost, *, mask: str, fraction: float, temperature: float
) -> Tensor:
    """Return C_u + m ∘ (w_s C_s − w_s C_u), the published diagonal safety mask, on core entries.

    Args:
        batch: The layers, with a safety adapter; w_s is its weight, C_u the weighted sum of the others.
        statistics: F_gain and F_cost; of other structures than `diagonal`, their diagonals are used.
        mask: `top`, `sigmoid` or `percentile`.
        fraction: For `top`: share of all core entries of all layers, those of largest ratio λ.
        temperature: For `sigmoid`: m = σ((ln λ − median ln λ) / temperature).

    Returns:
        Cores, shape (L, R_o, R_i), float64.
    """
    utility, safety = utility_and_safety(batch, "fisher_ratio_mask")
    check_batch(batch, statistics.space)
    ratio = statistics.diagonal_spectrum.eigenvalues
    weights = _mask(ratio, mask, fraction, temperature)
    part = statistics.space.split(weights)[batch.group]
    weight = batch.weights[batch.safety or 0]
    return utility + part * (safety - weight * utility)


def _mask(ratio: Tensor, kind: str, fraction: float, temperature: float) -> Tensor:
    """Return the mask of every core entry, shape (D,); entries with λ = 0 are never taken from the safety adapter."""
    positive = ratio > 0
    if not bool(positive.any()):
        raise FisherError(
            "The gain Fisher is zero everywhere; collect it from harmful prompts that reach the adapters."
        )
    if kind == "top":
        count = max(1, int(fraction * len(ratio)))
        chosen = torch.zeros_like(ratio)
        chosen[torch.argsort(ratio, descending=True, stable=True)[:count]] = 1.0
        return chosen
    logarithm = ratio[positive].log()
    if kind == "sigmoid":
        middle = float(np.median(logarithm.numpy()))
        soft = torch.sigmoid((logarithm - middle) / temperature)
    else:
        low, high = (float(q) for q in np.quantile(logarithm.numpy(), (0.05, 0.95)))
        soft = ((logarithm - low) / (high - low)).clamp(0.0, 1.0) if high > low else torch.full_like(logarithm, 0.5)
    result = torch.zeros_like(ratio)
    result[positive] = soft
    return result


def _shares(batch: CoreBatch, method: str) -> list[float]:
    weights: list[float] = batch.weights.tolist()
    if min(weights) < 0 or not sum(weights) > 0:
        raise InputError(
            f"'{method}' is an average, so its weights must be >= 0 and not all zero, but they are {weights}."
        )
    return weights


def _common_structure(fishers: Sequence[Fisher], names: Sequence[str]) -> Structure:
    structures = [fisher.structure for fisher in fishers]
    if len(set(structures)) > 1 or structures[0] not in _DAMPED_STRUCTURES:
        found = {name: structure.value for name, structure in zip(names, structures, strict=True)}
        raise FisherError(
            f"'fisher_full' takes Fishers of one structure, 'kfac', 'block' or 'diagonal', but these are {found}; collect "
            "them again with one of these (--structure kfac)."
        )
    return structures[0]


def _frobenius_norm(fisher: Fisher, name: str) -> float:
    if fisher.structure is Structure.KFAC:
        squares = [X.square().sum(dim=(1, 2)) * D.square().sum(dim=(1, 2)) for X, D in fisher.kronecker_factors()]
    elif fisher.structure is Structure.BLOCK:
        squares = [block.square() for block in fisher.blocks()]
    else:
        squares = [fisher.diagonal().square()]
    norm = math.sqrt(sum(float(part.sum()) for part in squares))
    if not norm > 0:
        raise FisherError(f"The Fisher of '{name}' is zero everywhere; collect it from data that reach the adapter.")
    return norm


def _solve_kfac(batch: CoreBatch, fishers: Sequence[Fisher], shares: Sequence[float], damping: float) -> Tensor:
    inputs, outputs = [], []
    for share, fisher in zip(shares, fishers, strict=True):
        X, D = fisher.kronecker_factors()[batch.group]
        inputs.append(_damp(X, damping**0.5))
        outputs.append(share * _damp(D, damping**0.5))
    system = KroneckerSum(torch.stack(inputs), torch.stack(outputs))
    return solve_kronecker_sum(system, batch.cores, batch.names)


def _solve_block(batch: CoreBatch, fishers: Sequence[Fisher], shares: Sequence[float], damping: float) -> Tensor:
    shape = batch.cores.shape[1:]
    total = torch.zeros(shape[0], *((shape[1] * shape[2],) * 2), dtype=torch.float64)
    weighted = torch.zeros(shape[0], shape[1] * shape[2], 1, dtype=torch.float64)
    for share, fisher, core in zip(shares, fishers, batch.cores, strict=True):
        damped = share * _damp(fisher.blocks()[batch.group], damping)
        total, weighted = total + damped, weighted + damped @ core.flatten(1).unsqueeze(-1)
    factor, info = torch.linalg.cholesky_ex(total)
    if bool((info != 0).any()):
        raise SolverError(_unseen(batch, int((info != 0).nonzero()[0]), damping))
    solution: Tensor = torch.cholesky_solve(weighted, factor).reshape(shape)
    return solution


def _damp(matrices: Tensor, damping: float) -> Tensor:
    scale = matrices.diagonal(dim1=1, dim2=2).mean(dim=1)
    return matrices + torch.diag_embed((damping * scale)[:, None].expand(-1, matrices.shape[1]))


def _unseen(batch: CoreBatch, layer: int, damping: float) -> str:
    return (
        f"The Fishers of layer '{batch.names[layer]}' are singular together with damping {damping:g}: the data never "
        "reach some of its directions. Raise the damping, or collect more data."
    )


_NORMALIZE = Option(
    "normalize", bool, True, "Divide each Fisher by its norm over all layers, so that no adapter wins by larger scores."
)

_SCALE = Option(
    "scale",
    float,
    1.0,
    "Factor of the result: averages shrink, and a common factor of the weights cancels. The papers have none.",
    low=0.0,
    low_is_allowed=False,
    high=100.0,
)

METHODS: tuple[Method, ...] = (
    Method(
        name="fisher_diagonal",
        title="Fisher merging (diagonal)",
        function=fisher_diagonal,
        acts_on="core",
        formula="C = Σ_t λ_t F_t ∘ C_t / Σ_t λ_t F_t,  F_t = diag E[Γ²] in core coordinates, F_t ← max(F_t / ‖F_t‖, floor)",
        paper="https://arxiv.org/abs/2111.09832",
        options=(
            _NORMALIZE,
            Option(
                "floor",
                float,
                1e-6,
                "Least Fisher entry, as a share of the root mean square of all entries of that Fisher.",
                low=0.0,
                low_is_allowed=False,
                high=1.0,
            ),
            _SCALE,
        ),
        needs=("fishers",),
        note=(
            "Takes Fishers of any structure and uses their diagonals. Weights are relative: doubling all changes nothing. "
            "The paper's diagonal is that of single weights; this one is that of core entries, whose basis the adapters "
            "set, so the two differ unless the Fisher is diagonal in both. Collect each Fisher at its own adapter "
            "(--reference NAME) with sampled labels."
        ),
    ),
    Method(
        name="fisher_full",
        title="Fisher merging (full matrix)",
        function=fisher_full,
        acts_on="core",
        formula="c = (Σ_t λ_t F_t)⁻¹ Σ_t λ_t F_t c_t per layer,  F_t ← F_t + damping · mean diagonal · I",
        paper="https://arxiv.org/abs/2111.09832",
        options=(
            _NORMALIZE,
            Option(
                "damping",
                float,
                1e-3,
                "Relative damping ε of every Fisher; large values give the weighted average.",
                low=0.0,
                high=1e6,
            ),
            _SCALE,
        ),
        needs=("fishers",),
        note=(
            "The paper's formula without its diagonal approximation, exact within the adapters' span for 'block' and "
            "'diagonal'; 'kfac' is a Kronecker approximation of each F_t, and their sum, which is none, is solved by "
            "conjugate gradients to a relative residual of 1e-10. 'ekfac' and 'global' are refused."
        ),
    ),
    Method(
        name="regmean",
        title="RegMean (in core coordinates)",
        function=regmean,
        acts_on="core",
        formula="C = (Σ_t λ_t C_t X_t)(Σ_t λ_t X_t)⁻¹,  X_t = E[x̃ x̃ᵀ], off-diagonal entries × off_diagonal",
        paper="https://arxiv.org/abs/2212.09849",
        options=(
            Option("off_diagonal", float, 0.9, "Factor α of the covariances' off-diagonal entries.", low=0.0, high=1.0),
            _SCALE,
        ),
        needs=("fishers",),
        note=(
            "Minimises RegMean's Σ_t λ_t E‖(ΔW − ΔW_t) x‖² over weight changes whose rows lie in the span V of all A_t. "
            "RegMean itself lets the rows leave that span; the two agree where every input covariance maps V into itself "
            "(uncorrelated inputs of one variance, or adapters that span the whole input). α shrinks entries of the "
            "covariance in the basis V, not those between single neurons. Covariances are means per position where "
            "RegMean takes sums over its examples. Needs 'kfac' or 'ekfac' Fishers, each collected at its own adapter."
        ),
    ),
    Method(
        name="sst_experts",
        title="SST of many experts",
        function=sst_experts,
        acts_on="core",
        formula="c = Σ_t λ_t P_t c_t,  P_t = (F_t + μ mean_{s≠t} F_s)⁻¹ F_t through F_t v = λ (mean_{s≠t} F_s) v",
        paper="https://arxiv.org/abs/2111.09832",
        options=(
            Option("mu", float, 1.0, "Weight μ of the others' cost; 0 gives the weighted sum.", low=0.0, high=1e6),
        ),
        needs=("fishers",),
        note=(
            "The many-expert form of SST: what each adapter gains on its own data, against what it costs the others on "
            "theirs. Of two adapters, with μ = 1, it is Fisher merging; of more it is not, because each has its weight and "
            "the cost is a mean. Takes Fishers of any structure but 'ekfac' (whose eigenbases differ), each collected at "
            "its own adapter (--reference NAME) with sampled labels. Filters shrink: of 4, 8, 14 and 20 adapters "
            "weights of 1.5, 2, 1 and 1.5 were best in experiment B."
        ),
    ),
    Method(
        name="fisher_ratio_mask",
        title="Diagonal Fisher-ratio mask",
        function=fisher_ratio_mask,
        acts_on="core",
        formula=(
            "C = C_u + w_s m ∘ (C_s − C_u),  λ = F_gain / (F_cost + 0.01 · mean of the layer),\n"
            "m = top fraction | σ((ln λ − median)/τ) | ln λ from its 5th to its 95th percentile"
        ),
        paper="https://github.com/shhk-prog/SST-merge",
        options=(
            Option("mask", str, "top", "Shape of the mask m.", choices=("top", "sigmoid", "percentile")),
            Option(
                "fraction",
                float,
                0.2,
                "For 'top': share of all core entries taken from the safety adapter.",
                low=0.0,
                low_is_allowed=False,
                high=1.0,
            ),
            Option(
                "temperature",
                float,
                1.0,
                "For 'sigmoid': τ; at 1 the mask is λ / (λ + median λ).",
                low=0.0,
                low_is_allowed=False,
                high=1e6,
            ),
        ),
        needs=("safety", "gain_and_cost"),
        note=(
            "The published mask acts on entries of lora_A and lora_B, which depend on the gauge, and adds 1e-6 to F_cost "
            "whatever its scale; this one acts on core entries with relative damping. The safety adapter's weight is the "
            "published α: at 1, masked entries come from the safety adapter alone."
        ),
    ),
)
