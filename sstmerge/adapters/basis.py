"""Orthonormal bases of stacked adapters, batched over layers of equal shape.

The bases are the singular vectors of the stacked weight changes [ΔW_1 … ΔW_T], each scaled to unit Frobenius norm, found
from small Gram matrices in float64: nothing of size d_out x d_in is formed, and A and B are read twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sstmerge.adapters.adapter import Adapter, natural_order

# A direction is kept if it carries more than this share of the Frobenius norm of some ΔW_t. Gram matrices in float64
# resolve relative singular values down to about 1e-8; float32 factors carry 1e-7 of rounding.
RANK_TOLERANCE = 1e-6

# Indices of the adapters stacked in a group, with their ranks.
Members = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayerGroup:
    """Layers of equal shape and equal core shape, batched.

    Attributes:
        names: Module paths, L of them.
        members: Indices of the adapters whose factors are stacked, in stacking order, and their ranks.
        U: Output basis, shape (L, d_out, R_o), float32, orthonormal columns.
        V: Input basis, shape (L, d_in, R_i), float32, orthonormal columns.
        output_transform: T with U = [B_1 … B_T] T, shape (L, Σr, R_o), float64.
        input_transform: T with V = [A_1ᵀ … A_Tᵀ] T, shape (L, Σr, R_i), float64.
    """

    names: tuple[str, ...]
    members: Members
    U: Tensor
    V: Tensor
    output_transform: Tensor
    input_transform: Tensor

    @property
    def core_shape(self) -> tuple[int, int, int]:
        """Shape (L, R_o, R_i) of the group's batch of cores."""
        return len(self.names), self.U.shape[2], self.V.shape[2]

    @property
    def size(self) -> int:
        """Number of core entries of the group."""
        layers, rows, columns = self.core_shape
        return layers * rows * columns


def stackable_layers(adapters: Sequence[Adapter]) -> dict[tuple[Members, tuple[int, int]], list[str]]:
    """Group layer names by who adapts them with which rank, and by the layer's shape."""
    names = sorted({path for adapter in adapters for path in adapter.layers}, key=natural_order)
    stackable: dict[tuple[Members, tuple[int, int]], list[str]] = {}
    for path in names:
        present = [(i, a.layers[path]) for i, a in enumerate(adapters) if path in a.layers]
        members = tuple((i, factors.rank) for i, factors in present)
        stackable.setdefault((members, present[0][1].shape), []).append(path)
    return stackable


def stack_factors(adapters: Sequence[Adapter], members: Members, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return [B_1 … B_T] (L, d_out, Σr) and [A_1ᵀ … A_Tᵀ] (L, d_in, Σr) in float64."""
    left = [torch.stack([adapters[i].layers[n].B for n in names]).double() for i, _ in members]
    right = [torch.stack([adapters[i].layers[n].A for n in names]).double().mT for i, _ in members]
    return torch.cat(left, dim=2), torch.cat(right, dim=2)


def build_groups(
    adapters: Sequence[Adapter], members: Members, names: Sequence[str], tolerance: float
) -> list[LayerGroup]:
    """Orthonormalise a batch of equally stacked layers and cut it by the ranks that were found."""
    left, right = stack_factors(adapters, members, names)
    scaling = torch.tensor([[adapters[i].layers[n].scaling for i, _ in members] for n in names], dtype=torch.float64)
    left_gram, right_gram = left.mT @ left, right.mT @ right
    ranks = [rank for _, rank in members]
    inverse_norms = _inverse_norms(left_gram, right_gram, ranks, scaling)
    output_transform, output_rank = _singular_transform(left_gram, right_gram, ranks, inverse_norms, tolerance)
    input_transform, input_rank = _singular_transform(right_gram, left_gram, ranks, inverse_norms, tolerance)
    by_rank: dict[tuple[int, int], list[int]] = {}
    for layer, pair in enumerate(zip(output_rank.tolist(), input_rank.tolist(), strict=True)):
        if min(pair) > 0:
            by_rank.setdefault(pair, []).append(layer)
    groups = []
    for (rows, columns), chosen in by_rank.items():
        index = torch.tensor(chosen)
        output, input_ = (
            output_transform[index, :, :rows].contiguous(),
            input_transform[index, :, :columns].contiguous(),
        )
        groups.append(
            LayerGroup(
                names=tuple(names[i] for i in chosen),
                members=members,
                U=(left[index] @ output).float(),
                V=(right[index] @ input_).float(),
                output_transform=output,
                input_transform=input_,
            )
        )
    return groups


def _inverse_norms(left_gram: Tensor, right_gram: Tensor, ranks: Sequence[int], scaling: Tensor) -> Tensor:
    """Return s_t / ‖ΔW_t‖_F for every layer and adapter, 0 where ΔW_t is zero; shape (L, T)."""
    norms = []
    offset = 0
    for t, rank in enumerate(ranks):
        block = slice(offset, offset + rank)
        squared = (left_gram[:, block, block] * right_gram[:, block, block]).sum(dim=(1, 2)).clamp_min(0)
        norms.append(scaling[:, t].abs() * squared.sqrt())
        offset += rank
    norm = torch.stack(norms, dim=1)
    return torch.where(norm > 0, scaling / norm.where(norm > 0, 1.0), 0.0)


def _singular_transform(
    gram: Tensor, other_gram: Tensor, ranks: Sequence[int], inverse_norms: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return T so that [B_1 … B_T] T has the left singular vectors of [ΔW_t / ‖ΔW_t‖]_t as columns, and their number.

    With K = blockdiag(w_t² A_t A_tᵀ) the stacked weight changes satisfy Σ_t w_t² ΔW_t ΔW_tᵀ = (B K^½)(B K^½)ᵀ, whose
    small Gram matrix K^½ BᵀB K^½ (Σr x Σr) gives the singular vectors.

    Args:
        gram: BᵀB of the stack, shape (L, Σr, Σr).
        other_gram: A Aᵀ of the other factor's stack, shape (L, Σr, Σr).
        ranks: Rank of every adapter in the stack.
        inverse_norms: Weights w_t, shape (L, T).
        tolerance: Singular values up to this are left out.

    Returns:
        The transform, shape (L, Σr, Σr), columns by falling singular value; and the rank per layer, shape (L,).
    """
    root = torch.zeros_like(gram)
    offset = 0
    for t, rank in enumerate(ranks):
        block = slice(offset, offset + rank)
        values, vectors = torch.linalg.eigh(other_gram[:, block, block])
        weighted = inverse_norms[:, t, None].abs() * values.clamp_min(0).sqrt()
        root[:, block, block] = (vectors * weighted[:, None, :]) @ vectors.mT
        offset += rank
    squared, vectors = torch.linalg.eigh(root @ gram @ root)
    squared, vectors = squared.flip(-1), vectors.flip(-1)
    kept = squared > tolerance**2
    inverse = torch.where(kept, squared.where(kept, 1.0).rsqrt(), 0.0)
    transform = root @ vectors * inverse[:, None, :]
    # Dividing by small singular values costs orthogonality; one symmetric correction restores it to rounding.
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    overlap = transform.mT @ gram @ transform + torch.diag_embed((~kept).to(gram.dtype))
    values, rotation = torch.linalg.eigh(overlap)
    correction = (rotation * values.clamp_min(torch.finfo(gram.dtype).eps).rsqrt()[:, None, :]) @ rotation.mT
    return transform @ torch.where(kept[:, :, None] & kept[:, None, :], correction, identity), kept.sum(dim=1)
