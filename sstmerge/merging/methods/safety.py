"""Methods that keep a merge safe: by the difference of an aligned and a base model, or by the Fisher of safety data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sstmerge.errors import InputError
from sstmerge.merging.methods.aligned_pair import AlignedPair
from sstmerge.merging.methods.registry import CoreBatch, Method, Option, RebasedCores
from sstmerge.merging.methods.statistics import GainAndCost, check_batch, safety_index, utility_and_safety


def safe_lora(
    batch: CoreBatch, pair: AlignedPair, *, select: str, threshold: float, number: int
) -> Tensor | RebasedCores:
    """Replace ΔW_t by C ΔW_t in the layers where the two are least alike, then return Σ_t w_t ΔW_t.

    Args:
        batch: The layers.
        pair: The aligned and the base model.
        select: `threshold` or `number`.
        threshold: Layers with cosine at most this are replaced.
        number: So many layers of lowest cosine are replaced, per adapter.

    Returns:
        Cores, shape (L, R_o, R_i), float64, if no layer of the batch is replaced; else cores in the basis of [U, C U].
    """
    chosen = []
    for name in batch.adapters:
        cosines = {layer: comparison.cosine for layer, comparison in pair.comparisons(name).items()}
        chosen.append(_lowest(cosines, select, threshold, number))
    replaced = _membership(batch, chosen)
    weighted = batch.weights[:, None, None, None] * batch.cores
    kept, projected = ((weighted * mask).sum(dim=0) for mask in (~replaced, replaced))
    if not bool(replaced.any()):
        return kept
    bases, cores = [], []
    for i, layer in enumerate(batch.names):
        U = batch.U[i].double()
        touched = bool(replaced[:, i].any())
        image = pair.apply(layer, U) if touched else torch.zeros_like(U)
        basis, triangle = torch.linalg.qr(torch.cat([U, image], dim=1))
        bases.append(basis.float())
        cores.append(triangle @ torch.cat([kept[i], projected[i]]))
    return RebasedCores(torch.stack(bases), torch.stack(cores))


def safe_merge(batch: CoreBatch, pair: AlignedPair, *, threshold: float, safety_share: float) -> Tensor:
    """Merge with the safety adapter only in the layers whose cosine with C ΔW_u is below a threshold.

    Args:
        batch: The layers of exactly two adapters, one of them the safety adapter.
        pair: The aligned and the base model.
        threshold: Layers with a cosine below this are merged.
        safety_share: Share of the safety adapter there.

    Returns:
        Cores, shape (L, R_o, R_i), float64.

    Raises:
        InputError: There are other than two adapters.
    """
    index = safety_index(batch, "safe_merge")
    if len(batch.adapters) != 2:
        raise InputError(
            f"SafeMERGE merges one fine-tuned adapter with the safety adapter, but got {list(batch.adapters)}; merge the "
            "fine-tuned adapters into one first."
        )
    utility, safety = utility_and_safety(batch, "safe_merge")
    comparisons = pair.comparisons(batch.adapters[1 - index])
    unsafe = [name in comparisons and comparisons[name].cosine < threshold for name in batch.names]
    share = safety_share * torch.tensor(unsafe, dtype=torch.float64)[:, None, None]
    return (1 - share) * utility + share * safety


def splora(batch: CoreBatch, pair: AlignedPair, *, select: str, threshold: float, number: int, prune: str) -> Tensor:
    """Drop the layers of every adapter by their E-DIEM score, then return Σ_t w_t ΔW_t.

    Args:
        batch: The layers.
        pair: The aligned and the base model.
        select: `threshold` or `number`.
        threshold: Layers with a score at most this are dropped (at least this, for `prune="highest"`).
        number: So many layers are dropped, per adapter.
        prune: `lowest` or `highest` scores.

    Returns:
        Cores, shape (L, R_o, R_i), float64.
    """
    sign = 1.0 if prune == "lowest" else -1.0
    chosen = []
    for name in batch.adapters:
        scores = e_diem({layer: comparison.distance for layer, comparison in pair.comparisons(name).items()})
        chosen.append(
            _lowest({layer: sign * score for layer, score in scores.items()}, select, sign * threshold, number)
        )
    kept = ~_membership(batch, chosen)
    return (batch.weights[:, None, None, None] * batch.cores * kept).sum(dim=0)


def e_diem(distances: dict[str, float]) -> dict[str, float]:
    """Return (d_l − mean d) / interquartile range of d, the empirical dimension-insensitive Euclidean metric.

    Args:
        distances: Distance of every layer per √entry.

    Returns:
        Score of every layer; zeros where all distances are equal.
    """
    if not distances:
        return {}
    values = np.array(list(distances.values()))
    low, high = np.quantile(values, (0.25, 0.75))
    spread = high - low
    scores = (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)
    return dict(zip(distances, scores.tolist(), strict=True))


def agl_merge(batch: CoreBatch, statistics: GainAndCost, *, directions: int) -> Tensor:
    """Return (I − P_A) C_u + w_s C_s, with P_A the projector on the top eigenvectors of the safety Fisher.

    Args:
        batch: The layers, with a safety adapter; C_u is the weighted sum of the others.
        statistics: F_gain, of the structure `diagonal`, `kfac`, `block` or `global`.
        directions: Number m of eigenvectors, over all layers together.

    Returns:
        Cores, shape (L, R_o, R_i), float64.
    """
    utility, safety = utility_and_safety(batch, "agl_merge")
    check_batch(batch, statistics.space)
    return utility - statistics.gain_eigenspace.project(directions, batch, utility) + safety


def vila_pilot(batch: CoreBatch, statistics: GainAndCost, *, modules: float) -> Tensor:
    """Return C_u + 1[module kept] w_s C_s: the safety adapter enters the modules with the best trace ratio only.

    Args:
        batch: The layers, with a safety adapter; C_u is the weighted sum of the others.
        statistics: F_gain and F_cost, usually of a small pilot.
        modules: Share of the modules that is kept.

    Returns:
        Cores, shape (L, R_o, R_i), float64.
    """
    utility, safety = utility_and_safety(batch, "vila_pilot")
    check_batch(batch, statistics.space)
    best = statistics.best_modules(modules)
    kept = torch.tensor([name in best for name in batch.names], dtype=torch.float64)
    return utility + kept[:, None, None] * safety


def _lowest(scores: dict[str, float], select: str, threshold: float, number: int) -> frozenset[str]:
    """Return the layers with the lowest scores."""
    if select == "threshold":
        return frozenset(layer for layer, score in scores.items() if score <= threshold)
    if number > len(scores):
        raise InputError(f"number is {number}, but the adapter changes {len(scores)} layers only.")
    return frozenset(sorted(scores, key=lambda layer: scores[layer])[:number])


def _membership(batch: CoreBatch, chosen: list[frozenset[str]]) -> Tensor:
    """Return which layers were chosen for which adapter, shape (T, L, 1, 1), bool."""
    rows = [[name in layers for name in batch.names] for layers in chosen]
    return torch.tensor(rows, dtype=torch.bool)[:, :, None, None]


def _select(what: str) -> Option:
    return Option("select", str, "threshold", f"How layers are chosen, by {what}.", choices=("threshold", "number"))


_PAIR_NOTE = (
    "Reads the aligned and the base model from safetensors, a layer at a time. C is no projector: its scale is that of "
    "W_aligned − W_base. "
)

METHODS: tuple[Method, ...] = (
    Method(
        name="safe_lora",
        title="SafeLoRA",
        function=safe_lora,
        acts_on="core",
        formula="ΔW_t ← C ΔW_t where cos(C ΔW_t, ΔW_t) ≤ threshold,  C = V Vᵀ / ‖V‖_F,  V = W_aligned − W_base",
        paper="https://arxiv.org/abs/2405.16833",
        options=(
            _select("their cosine"),
            Option("threshold", float, 0.5, "Largest cosine of a layer that is replaced.", low=-1.0, high=1.0),
            Option("number", int, 10, "For select=number: layers of lowest cosine that are replaced.", low=1),
        ),
        needs=("aligned_pair",),
        note=_PAIR_NOTE
        + "Every adapter is treated on its own; then they are added with their weights. Replaced layers have up to twice "
        "the rank, since C ΔW leaves the span of the adapters.",
    ),
    Method(
        name="safe_merge",
        title="SafeMERGE",
        function=safe_merge,
        acts_on="core",
        formula="ΔW = (1 − a) ΔW_u + a ΔW_s where cos(C ΔW_u, ΔW_u) < threshold, else ΔW_u",
        paper="https://arxiv.org/abs/2503.17239",
        options=(
            Option("threshold", float, 0.35, "Layers with a cosine below this are merged.", low=-1.0, high=1.0),
            Option("safety_share", float, 0.2, "Share a of the safety adapter.", low=0.0, high=1.0),
        ),
        needs=("safety", "aligned_pair"),
        note=_PAIR_NOTE
        + "Takes one fine-tuned adapter and the safety adapter, each multiplied by its weight first. Acts on exact weight "
        "changes; the published code adds lora_A and lora_B apart.",
    ),
    Method(
        name="splora",
        title="SPLoRA (E-DIEM pruning)",
        function=splora,
        acts_on="core",
        formula="ΔW_t ← 0 where (d − mean d) / IQR(d) ≤ threshold over layers,  d = ‖C ΔW_t − ΔW_t‖_F / √(d_out d_in)",
        paper="https://arxiv.org/abs/2506.18931",
        options=(
            Option("select", str, "number", "How layers are chosen, by their score.", choices=("threshold", "number")),
            Option(
                "threshold", float, 0.3, "For select=threshold: score at which a layer is dropped.", low=-1e6, high=1e6
            ),
            Option("number", int, 10, "For select=number: layers that are dropped.", low=1),
            Option("prune", str, "lowest", "Which end of the scores is dropped.", choices=("lowest", "highest")),
        ),
        needs=("aligned_pair",),
        note=_PAIR_NOTE
        + "Our reading of E-DIEM: mean and interquartile range are those of the adapter's own layers, and distances are per "
        "entry, so that layers of several shapes compare. The published code takes both from fifty copies of the layer "
        "itself, which leaves rounding noise over rounding noise, and its max-min scaling cancels out. It drops the lowest "
        "scores, which are the layers that C changes least; 'highest' drops those that it changes most.",
    ),
    Method(
        name="agl_merge",
        title="AlignGuard projection (our adaptation)",
        function=agl_merge,
        acts_on="core",
        formula="C = (I − P_A) C_u + w_s C_s,  P_A = top m eigenvectors of F_gain in core coordinates",
        paper="https://arxiv.org/abs/2508.02079",
        options=(Option("directions", int, 32, "Number m of eigenvectors, over all layers together.", low=1),),
        needs=("safety", "gain"),
        note=(
            "AlignGuard-LoRA is a training method; this applies its split of a weight change to adapters that are trained "
            "already, and is our own adaptation. P_A is Euclidean and lives in the adapters' span; m counts eigenvectors of "
            "all layers together, where the paper's m counts them per module. Takes 'diagonal', 'kfac', 'block' or 'global' "
            "Fishers of safety data. The training losses are `sstmerge.alignguard`."
        ),
    ),
    Method(
        name="vila_pilot",
        title="VILA-style identification",
        function=vila_pilot,
        acts_on="core",
        formula="C = C_u + 1[l kept] w_s C_s,  kept: the modules of largest trace(F_gain) / trace(F_cost)",
        paper="https://arxiv.org/abs/2508.21300",
        options=(
            Option(
                "modules",
                float,
                0.5,
                "Share of the modules that the safety adapter enters.",
                low=0.0,
                low_is_allowed=False,
                high=1.0,
            ),
        ),
        needs=("safety", "gain_and_cost"),
        note=(
            "Not VILA, which selects no modules: it starts an unlearning adapter from an importance-weighted SVD. This is "
            "the module selection that is often read into it, defined by traces of the two Fishers; a small pilot is "
            "enough. VILA's own importance, Imp(W) ≈ Imp(B) Imp(A) with variances of the gradients of lora_A and lora_B, "
            "cannot be had from a Fisher file: ∂L/∂A = s Bᵀ G needs G on all input neurons and ∂L/∂B = s G Aᵀ on all output "
            "neurons, of which only Uᵀ G V is kept."
        ),
    ),
)
