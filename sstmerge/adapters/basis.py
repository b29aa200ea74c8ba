"""Orthonormal bases of stacked adapters, batched over layers of equal shape.

The bases are the singular vectors of the stacked weight changes [ΔW_1 … ΔW_T], each scaled to unit Frobenius norm, found
from small Gram matrices in float64: nothing of size d_out x d_in is formed. The bases themselves are formed only where the
model's activations are projected; cores and merged factors come from the transforms (cores also from the Gram matrices,
where factors depend on each other).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sstmerge import batched_lu
from sstmerge.adapters.adapter import Adapter, natural_order
from sstmerge.adapters.stacks import FactorStack
from sstmerge.errors import AdapterError
from sstmerge.ops import eigh

# A direction is kept if it carries more than this share of the Frobenius norm of some ΔW_t. Gram matrices in float64
# resolve relative singular values down to about 1e-8; float32 factors carry 1e-7 of rounding.
RANK_TOLERANCE = 1e-6
# From an overlap that is off by 1e-3, as it is at that tolerance, two steps reach 1e-11 and three reach rounding.
_ORTHOGONALITY_STEPS = 3

# Indices of the adapters stacked in a group, with their ranks.
Members = tuple[tuple[int, int], ...]
Stacked = tuple[FactorStack, FactorStack, Tensor]


@dataclass(frozen=True)
class LayerGroup:
    """Layers of equal shape and equal core shape, batched.

    Attributes:
        names: Module paths, L of them.
        members: Indices of the adapters whose factors are stacked, in stacking order, and their ranks.
        outputs: [B_1 … B_T].
        inputs: [A_1ᵀ … A_Tᵀ].
        scaling: Scaling of every layer and member, shape (L, T), float64.
        output_transform: T with U = [B_1 … B_T] T, shape (L, Σr, R_o), float64.
        input_transform: T with V = [A_1ᵀ … A_Tᵀ] T, shape (L, Σr, R_i), float64.
    """

    names: tuple[str, ...]
    members: Members
    outputs: FactorStack
    inputs: FactorStack
    scaling: Tensor
    output_transform: Tensor
    input_transform: Tensor

    @cached_property
    def U(self) -> Tensor:
        """Output basis, shape (L, d_out, R_o), float32, orthonormal columns; calibration needs it, merges do not."""
        return self.outputs.combine(self.output_transform, torch.float32)

    @cached_property
    def V(self) -> Tensor:
        """Input basis, shape (L, d_in, R_i), float32, orthonormal columns."""
        return self.inputs.combine(self.input_transform, torch.float32)

    @property
    def core_shape(self) -> tuple[int, int, int]:
        """Shape (L, R_o, R_i) of the group's batch of cores."""
        return len(self.names), self.output_transform.shape[2], self.input_transform.shape[2]

    @property
    def size(self) -> int:
        """Number of core entries of the group."""
        layers, rows, columns = self.core_shape
        return layers * rows * columns

    def core(self, weights: Mapping[int, float]) -> Tensor:
        """Return the cores Σ_t w_t C_t, with C_t = s_t (Uᵀ B_t)(A_t V), in one product.

        Args:
            weights: w by index of the adapter; those that are left out do not count.

        Returns:
            Shape (L, R_o, R_i), float64; zero where no adapter has a part in the group.

        Raises:
            AdapterError: The basis was read from a damaged file.
        """
        left, right, offset = [], [], 0
        for t, (member, rank) in enumerate(self.members):
            block = slice(offset, offset + rank)
            if member in weights:
                left.append(weights[member] * self.scaling[:, t, None, None] * self._stack_in_U[:, :, block])
                right.append(self._stack_in_V[:, :, block])
            offset += rank
        if not left:
            return self.scaling.new_zeros(self.core_shape)
        return torch.cat(left, dim=2) @ torch.cat(right, dim=2).mT

    def in_outputs(self, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """Return U C for columns C (L, R_o, k), float64: the factor B of a merged layer, shape (L, d_out, k)."""
        weights = self.output_transform @ columns
        working = _working_dtype(self._stack_in_U, weights, columns, dtype)
        return self.outputs.combine(weights, dtype, working=working)

    def in_inputs(self, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (V C)ᵀ for columns C (L, R_i, k), float64: the factor A of a merged layer, shape (L, k, d_in)."""
        weights = self.input_transform @ columns
        working = _working_dtype(self._stack_in_V, weights, columns, dtype)
        return self.inputs.combine(weights, dtype, rows=True, working=working)

    @cached_property
    def _stack_in_U(self) -> Tensor:
        """Uᵀ [B_1 … B_T], shape (L, R_o, Σr), float64."""
        return self._in_basis(self.output_transform, self.outputs)

    @cached_property
    def _stack_in_V(self) -> Tensor:
        """Vᵀ [A_1ᵀ … A_Tᵀ], shape (L, R_i, Σr), float64."""
        return self._in_basis(self.input_transform, self.inputs)

    def _in_basis(self, transform: Tensor, stack: FactorStack) -> Tensor:
        """Return the coordinates of a stack S in its basis S T.

        A basis of independent factors has T⁻¹: the factors themselves, which a merge would have to pass over, are not
        needed. Where some depend on others the coordinates are Tᵀ (SᵀS).

        Raises:
            AdapterError: The transform of a file is singular.
        """
        if transform.shape[1] != transform.shape[2]:
            return transform.mT @ stack.gram
        inverse, info = batched_lu.inverse(transform)
        if bool(info.any()):
            name = self.names[int(info.nonzero()[0])]
            raise AdapterError(
                f"The recorded basis of layer '{name}' is singular: the file is damaged; collect the statistics anew."
            )
        return inverse


def _working_dtype(stack: Tensor, weights: Tensor, columns: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return float32 where its rounding is hidden by that of the result, or float64.

    In a product S W of n = Σr terms, a column in float32 is off by 4 √n u ‖S‖ ‖w‖ at most, u = 2⁻²⁴, but for bad luck
    (Higham & Mary 2019, https://doi.org/10.1137/18M1226312); ill-conditioned factors have ‖S‖ ‖w‖ far above the result's
    norm. A quarter of what rounding the result costs is allowed.

    Args:
        stack: S in its basis, shape (L, R, Σr): its norm is that of S.
        weights: W = T C, shape (L, Σr, k).
        columns: C, shape (L, R, k): its columns have the norms of the result's.
        dtype: Dtype of the result.
    """
    # Users may have allowed products of float32 to be less than that.
    if dtype not in (torch.bfloat16, torch.float16) or torch.get_float32_matmul_precision() != "highest":
        return torch.float64
    norms = columns.norm(dim=1)
    lost = 4 * stack.shape[2] ** 0.5 * 2.0**-24 * stack.norm(dim=(1, 2))[:, None] * weights.norm(dim=1)
    hidden = bool((lost <= torch.finfo(dtype).eps / 8 * norms).all())
    return torch.float32 if hidden else torch.float64


def stack_group(adapters: Sequence[Adapter], members: Members, names: Sequence[str]) -> Stacked:
    """Return what of a group depends on the adapters alone.

    Args:
        adapters: All adapters.
        members: Those that are stacked, with their ranks.
        names: Layers, all of one shape.

    Returns:
        [B_1 … B_T], [A_1ᵀ … A_Tᵀ], and the scaling of every layer and member (L, T), float64.
    """
    factors = [[adapters[i].layers[name] for name in names] for i, _ in members]
    scaling = torch.tensor([[f.scaling for f in own] for own in factors], dtype=torch.float64).mT.contiguous()
    return (
        FactorStack(tuple(tuple(f.B for f in own) for own in factors), transposed=False),
        FactorStack(tuple(tuple(f.A for f in own) for own in factors), transposed=True),
        scaling.to(factors[0][0].B.device),
    )


def stackable_layers(adapters: Sequence[Adapter]) -> dict[tuple[Members, tuple[int, int]], list[str]]:
    """Group layer names by who adapts them with which rank, and by the layer's shape."""
    names = sorted({path for adapter in adapters for path in adapter.layers}, key=natural_order)
    stackable: dict[tuple[Members, tuple[int, int]], list[str]] = {}
    for path in names:
        present = [(i, a.layers[path]) for i, a in enumerate(adapters) if path in a.layers]
        members = tuple((i, factors.rank) for i, factors in present)
        stackable.setdefault((members, present[0][1].shape), []).append(path)
    return stackable


def build_groups(
    adapters: Sequence[Adapter], members: Members, names: Sequence[str], tolerance: float
) -> list[LayerGroup]:
    """Orthonormalise a batch of equally stacked layers and cut it by the ranks that were found."""
    outputs, inputs, scaling = stack_group(adapters, members, names)
    ranks = [rank for _, rank in members]
    inverse_norms = _inverse_norms(outputs.gram, inputs.gram, ranks, scaling)
    output_transform, output_rank = _singular_transform(outputs.gram, inputs.gram, ranks, inverse_norms, tolerance)
    input_transform, input_rank = _singular_transform(inputs.gram, outputs.gram, ranks, inverse_norms, tolerance)
    by_rank: dict[tuple[int, int], list[int]] = {}
    for layer, pair in enumerate(zip(output_rank.tolist(), input_rank.tolist(), strict=True)):
        if min(pair) > 0:
            by_rank.setdefault(pair, []).append(layer)
    return [
        LayerGroup(
            names=tuple(names[i] for i in chosen),
            members=members,
            outputs=outputs.of_layers(chosen),
            inputs=inputs.of_layers(chosen),
            scaling=scaling[chosen],
            output_transform=output_transform[chosen, :, :rows].contiguous(),
            input_transform=input_transform[chosen, :, :columns].contiguous(),
        )
        for (rows, columns), chosen in by_rank.items()
    ]


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

    With K = L Lᵀ = blockdiag(w_t² A_t A_tᵀ) the stacked weight changes satisfy Σ_t w_t² ΔW_t ΔW_tᵀ = (B L)(B L)ᵀ, whose
    small Gram matrix Lᵀ BᵀB L (Σr x Σr) gives the singular vectors.

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
        root[:, block, block] = inverse_norms[:, t, None, None].abs() * _square_root(other_gram[:, block, block])
        offset += rank
    squared, vectors = eigh(root.mT @ gram @ root)
    squared, vectors = squared.flip(-1), vectors.flip(-1)
    kept = squared > tolerance**2
    inverse = torch.where(kept, squared.where(kept, 1.0).rsqrt(), 0.0)
    transform = root @ vectors * inverse[:, None, :]
    # Dividing by small singular values costs orthogonality; Newton-Schulz steps towards the inverse square root of the
    # overlap restore it to rounding. Columns left out stay zero.
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for _ in range(_ORTHOGONALITY_STEPS):
        transform = transform @ (1.5 * identity - 0.5 * (transform.mT @ gram @ transform))
    return transform, kept.sum(dim=1)


def _square_root(gram: Tensor) -> Tensor:
    """Return some root L of positive semidefinite matrices, L Lᵀ = G: Cholesky's, or where that fails the symmetric one."""
    root: Tensor
    root, info = torch.linalg.cholesky_ex(gram)
    failed = info != 0
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(gram[failed])
        root[failed] = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
    return root
