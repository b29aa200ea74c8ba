"""Methods that drop entries: magnitude pruning, TIES and DARE on dense weight changes, and the same on cores.

A dense weight change is full of small entries and its sparse form has full rank, so the result is cut to a rank. In the
cores the same steps cost next to nothing and the result keeps its low rank; it is another method, with a name of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sstmerge import ops
from sstmerge.merging.methods.registry import CoreBatch, DeltaLayer, Method, Option
from sstmerge.merging.methods.trimming import BLOCK, Thresholds, TrimOver, cores_of, deltas_of, prepare_ties

MajoritySign = Literal["total", "frequency"]

TIES_PAPER = "https://arxiv.org/abs/2306.01708"
DARE_PAPER = "https://arxiv.org/abs/2311.03099"
CORE_SPACE_PAPER = "https://arxiv.org/abs/2509.17786"


def magnitude_prune(layer: DeltaLayer, *, density: float) -> Tensor:
    """Return Σ_t w_t prune(ΔW_t), where pruning keeps the largest entries of every tensor.

    Args:
        layer: The layer.
        density: Share of entries that is kept.

    Returns:
        Merged weight change, shape (d_out, d_in), float32.
    """
    pruned = (ops.magnitude_prune([delta], density)[0] for delta in layer.deltas)
    return _weighted_sum(pruned, layer.weights)


def ties(
    layer: DeltaLayer,
    *,
    density: float,
    majority_sign: MajoritySign,
    scale: float,
    trim_over: TrimOver = "tensor",
    thresholds: Thresholds | None = None,
) -> Tensor:
    """Trim, elect signs and merge what agrees (TIES; Yadav et al. 2023, https://arxiv.org/abs/2306.01708).

    Args:
        layer: The layer.
        density: Share of entries that is kept by the trim.
        majority_sign: Whether the sum of the entries elects the sign, or their number.
        scale: λ.
        trim_over: Whether entries compete within the layer or within the whole adapter.
        thresholds: Smallest magnitude that the trim keeps, by adapter, where they compete within the whole adapter.

    Returns:
        Merged weight change, shape (d_out, d_in), float32.
    """
    batch = layer.deltas[:, None]
    return scale * merge_by_ties(batch, layer.weights, layer.adapters, density, majority_sign, thresholds)[0]


def dare(layer: DeltaLayer, *, density: float, seed: int) -> Tensor:
    """Return Σ_t w_t drop(ΔW_t) (DARE; Yu et al. 2024, https://arxiv.org/abs/2311.03099).

    Args:
        layer: The layer.
        density: Probability 1 − p that an entry is kept.
        seed: Seed of the masks.

    Returns:
        Merged weight change, shape (d_out, d_in), float32.
    """
    dropped = (
        ops.dare([delta], density, seed, first_stream=_stream(adapter, layer.name))[0]
        for delta, adapter in zip(layer.deltas, layer.adapters, strict=True)
    )
    return _weighted_sum(dropped, layer.weights)


def dare_ties(
    layer: DeltaLayer, *, density: float, trim_density: float, majority_sign: MajoritySign, scale: float, seed: int
) -> Tensor:
    """Apply TIES to weight changes that DARE has made sparse.

    Args:
        layer: The layer.
        density: Probability 1 − p that DARE keeps an entry.
        trim_density: Share of entries that is kept by the trim of TIES.
        majority_sign: As in `ties`.
        scale: λ.
        seed: Seed of the masks.

    Returns:
        Merged weight change, shape (d_out, d_in), float32.
    """
    dropped = drop_at_random(layer.deltas[:, None], layer.adapters, [layer.name], density, seed)
    return scale * merge_by_ties(dropped, layer.weights, layer.adapters, trim_density, majority_sign)[0]


def core_ties(
    batch: CoreBatch,
    *,
    density: float,
    majority_sign: MajoritySign,
    scale: float,
    trim_over: TrimOver = "tensor",
    thresholds: Thresholds | None = None,
) -> Tensor:
    """Apply TIES to the entries of the cores (Panariello et al. 2025, https://arxiv.org/abs/2509.17786).

    Args:
        batch: The layers.
        density: As in `ties`.
        majority_sign: As in `ties`.
        scale: λ.
        trim_over: As in `ties`.
        thresholds: As in `ties`.

    Returns:
        Merged cores, shape (L, R_o, R_i), float64.
    """
    signs = basis_signs(batch.U)[:, :, None] * basis_signs(batch.V)[:, None, :]
    values = signs * batch.cores
    return scale * signs * merge_by_ties(values, batch.weights, batch.adapters, density, majority_sign, thresholds)


def core_dare(batch: CoreBatch, *, density: float, seed: int) -> Tensor:
    """Apply DARE to the entries of the cores.

    Args:
        batch: The layers.
        density: As in `dare`.
        seed: As in `dare`.

    Returns:
        Merged cores, shape (L, R_o, R_i), float64.
    """
    return _weighted_sum(drop_at_random(batch.cores, batch.adapters, batch.names, density, seed), batch.weights)


def core_dare_ties(
    batch: CoreBatch, *, density: float, trim_density: float, majority_sign: MajoritySign, scale: float, seed: int
) -> Tensor:
    """Apply DARE and then TIES to the entries of the cores.

    Args:
        batch: The layers.
        density: As in `dare_ties`.
        trim_density: As in `dare_ties`.
        majority_sign: As in `ties`.
        scale: λ.
        seed: As in `dare`.

    Returns:
        Merged cores, shape (L, R_o, R_i), float64.
    """
    dropped = drop_at_random(batch.cores, batch.adapters, batch.names, density, seed)
    signs = basis_signs(batch.U)[:, :, None] * basis_signs(batch.V)[:, None, :]
    return scale * signs * merge_by_ties(signs * dropped, batch.weights, batch.adapters, trim_density, majority_sign)


def merge_by_ties(
    values: Tensor,
    weights: Tensor,
    adapters: Sequence[str],
    density: float,
    majority_sign: MajoritySign,
    thresholds: Thresholds | None = None,
) -> Tensor:
    """Trim, elect signs and merge what agrees.

    Args:
        values: Tensors of every adapter, shape (T, L, …).
        weights: Weights, shape (T,).
        adapters: Names of the adapters.
        density: Share of entries of every tensor that is kept, where there are no thresholds.
        majority_sign: Whether the sum of the entries elects the sign, or their number.
        thresholds: Smallest magnitude that is kept, by adapter.

    Returns:
        Merged tensors, shape (L, …).
    """
    if thresholds is None:
        return ops.ties(values, weights, density, majority_sign_method=majority_sign)
    # Entry by entry from here on, so that blocks bound the memory.
    smallest = torch.tensor([thresholds.get(name, 0.0) for name in adapters])[:, None]
    merged = []
    for block in values.flatten(1).split(BLOCK, dim=1):
        kept = torch.where(block.abs().float() >= smallest, block, 0.0)
        merged.append(ops.ties(kept[:, None], weights, 1.0, majority_sign_method=majority_sign)[0])
    return torch.cat(merged).view(values.shape[1:])


def basis_signs(basis: Tensor) -> Tensor:
    """Return the signs that give the columns of a basis a positive sum.

    Singular vectors come with arbitrary signs, but TIES has to know which sign is positive: it wins a draw.

    Args:
        basis: Shape (L, n, R).

    Returns:
        1 or −1, shape (L, R), float64.
    """
    return torch.where(basis.sum(dim=1) < 0, -1.0, 1.0).double()


def drop_at_random(values: Tensor, adapters: Sequence[str], layers: Sequence[str], density: float, seed: int) -> Tensor:
    """Drop entries at random and divide the others by the density.

    Args:
        values: Tensors of every adapter and layer, shape (T, L, …).
        adapters: Names of the T adapters.
        layers: Names of the L layers.
        density: Probability that an entry is kept.
        seed: Seed. The mask of a tensor depends on the seed, the adapter's and the layer's name alone, so that neither
            the order of the adapters nor the other layers matter.

    Returns:
        The sparse tensors, shape (T, L, …).
    """
    dropped = torch.empty_like(values)
    for t, adapter in enumerate(adapters):
        for l, layer in enumerate(layers):
            stream = _stream(adapter, layer)
            dropped[t, l] = ops.dare([values[t, l]], density, seed, first_stream=stream)[0]
    return dropped


def _stream(adapter: str, layer: str) -> int:
    """Return the number of a random stream, 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{adapter}\0{layer}".encode()).digest()[:8], "little") >> 1


def _weighted_sum(tensors: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Add tensors one at a time, so that a generator's need not exist together."""
    pairs = zip(tensors, weights.tolist(), strict=True)
    first, weight = next(pairs)
    total: Tensor = weight * first
    for tensor, weight in pairs:
        total.add_(tensor, alpha=weight)
    return total


SCALE = Option("scale", float, 1.0, "λ, the factor of the merged weight change.")
SEED = Option("seed", int, 0, "Seed of the masks.", low=0, high=2**63 - 1)
MAJORITY_SIGN = Option(
    "majority_sign",
    str,
    "total",
    "What elects the sign of an entry: the sum over adapters (total) or the number of either sign (frequency).",
    choices=("total", "frequency"),
)
TRIM_OVER = Option(
    "trim_over",
    str,
    "model",
    "Entries compete within the whole adapter (model, as in the paper) or within each layer (tensor, as in PEFT).",
    choices=("model", "tensor"),
)


def density(default: float, what: str, name: str = "density") -> Option:
    """Return an option in (0, 1].

    Args:
        default: Its default.
        what: What it says, one sentence.
        name: Its name.

    Returns:
        The option.
    """
    return Option(name, float, default, what, low=0.0, high=1.0, low_is_allowed=False)


KEPT_BY_TRIM = density(0.2, "K, the share of entries that the trim keeps.")
KEPT_BY_DARE = density(0.9, "1 − p, the probability that an entry is kept.")
KEPT_AFTER_DARE = density(1.0, "K, the share of entries that the trim of TIES keeps, after DARE.", "trim_density")

TIES_FORMULA = (
    "τ_t = trim(ΔW_t); γ = sign(Σ_t τ_t); ΔW = λ · Σ_t w_t τ_t [sign τ_t = γ] / #{t : sign τ_t = γ}, entry by entry"
)
DARE_FORMULA = "ΔW = Σ_t w_t m_t ∘ ΔW_t / (1 − p), m_t ~ Bernoulli(1 − p), entry by entry"
DARE_TIES_FORMULA = "TIES of m_t ∘ ΔW_t / (1 − p), m_t ~ Bernoulli(1 − p), entry by entry"
_TIES_NOTE = (
    "Weights multiply what is averaged and have no vote on the sign, as in PEFT (the paper has no weights). Where the "
    "entries cancel exactly, the sign is positive (the paper: the majority's sign). "
)
_MASK_NOTE = "Masks depend on the seed and the names of adapter and layer alone. "
_DENSE_NOTE = "One dense layer at a time, then a truncated SVD."
CORE_NOTE = (
    "Acts on core entries instead of weight entries: cheaper, another method, and the result keeps its low rank. The basis "
    "is that of the stacked weight changes, each of norm one; the paper's is that of the stacked factors, which depends on "
    "how a weight change is split into factors."
)

METHODS: tuple[Method, ...] = (
    Method(
        name="magnitude_prune",
        title="Magnitude pruning",
        function=magnitude_prune,
        acts_on="delta",
        formula="ΔW = Σ_t w_t trim(ΔW_t), where trim keeps the entries of largest magnitude",
        paper=TIES_PAPER,
        options=(density(0.2, "Share of entries of every layer that is kept."),),
        note="The trim of TIES alone, layer by layer. " + _DENSE_NOTE,
        rank="largest",
    ),
    Method(
        name="ties",
        title="TIES",
        function=ties,
        acts_on="delta",
        formula=TIES_FORMULA,
        paper=TIES_PAPER,
        options=(KEPT_BY_TRIM, TRIM_OVER, MAJORITY_SIGN, SCALE),
        note=_TIES_NOTE + "trim_over=model takes two more passes over the layers. " + _DENSE_NOTE,
        rank="largest",
        prepare=prepare_ties(deltas_of),
    ),
    Method(
        name="dare",
        title="DARE",
        function=dare,
        acts_on="delta",
        formula=DARE_FORMULA,
        paper=DARE_PAPER,
        options=(KEPT_BY_DARE, SEED),
        note=_MASK_NOTE + _DENSE_NOTE,
        rank="largest",
    ),
    Method(
        name="dare_ties",
        title="DARE-TIES",
        function=dare_ties,
        acts_on="delta",
        formula=DARE_TIES_FORMULA,
        paper=DARE_PAPER,
        options=(KEPT_BY_DARE, KEPT_AFTER_DARE, MAJORITY_SIGN, SCALE, SEED),
        note=_MASK_NOTE + _TIES_NOTE + "The trim, if any, is layer by layer. " + _DENSE_NOTE,
        rank="largest",
    ),
    Method(
        name="core_ties",
        title="TIES in core space",
        function=core_ties,
        acts_on="core",
        formula="M = TIES of the cores C_t, ΔW = U M Vᵀ",
        paper=CORE_SPACE_PAPER,
        options=(KEPT_BY_TRIM, TRIM_OVER, MAJORITY_SIGN, SCALE),
        note=CORE_NOTE + " " + _TIES_NOTE,
        prepare=prepare_ties(cores_of),
    ),
    Method(
        name="core_dare",
        title="DARE in core space",
        function=core_dare,
        acts_on="core",
        formula="M = Σ_t w_t m_t ∘ C_t / (1 − p), m_t ~ Bernoulli(1 − p), ΔW = U M Vᵀ",
        paper=CORE_SPACE_PAPER,
        options=(KEPT_BY_DARE, SEED),
        note=CORE_NOTE + " " + _MASK_NOTE,
    ),
    Method(
        name="core_dare_ties",
        title="DARE-TIES in core space",
        function=core_dare_ties,
        acts_on="core",
        formula="M = TIES of m_t ∘ C_t / (1 − p), m_t ~ Bernoulli(1 − p), ΔW = U M Vᵀ",
        paper=CORE_SPACE_PAPER,
        options=(KEPT_BY_DARE, KEPT_AFTER_DARE, MAJORITY_SIGN, SCALE, SEED),
        note=CORE_NOTE + " " + _MASK_NOTE + _TIES_NOTE,
    ),
)
