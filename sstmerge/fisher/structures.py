"""The five structures of a Fisher: what is summed while data pass, and the quadratic form that it stands for.

Γ_n = Σ_t δ̃_t x̃_tᵀ (R_o, R_i) is the score of sequence n with respect to a layer's core. In units of one response token,

    diagonal   F = diag E[Γ²]
    kfac       F = X ⊗ D, X = E[x̃ x̃ᵀ], D = E[δ̃ δ̃ᵀ]   (expand: over positions; reduce: over sequences, with mean input
               and summed gradient; Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636)
    ekfac      F = diag E[(Qᵀ Γ P)²] in a Kronecker basis (George et al. 2018, https://arxiv.org/abs/1806.03884)
    block      F = E[vec Γ vec Γᵀ], exact for the layer; vec is row-major
    global     the scores of all layers themselves, one row per sequence: F = GᵀG / tokens, exact

Every sum has a leading axis of size 2, the split halves: sequences with even and with odd index.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from sstmerge.errors import InputError


class Structure(StrEnum):
    """What a Fisher keeps of the scores."""

    DIAGONAL = "diagonal"
    KFAC = "kfac"
    EKFAC = "ekfac"
    BLOCK = "block"
    GLOBAL = "global"


class WeightSharing(StrEnum):
    """How `kfac` treats the tokens of a sequence."""

    EXPAND = "expand"
    REDUCE = "reduce"


def parse_structure(name: str) -> Structure:
    """Return the structure of that name.

    Args:
        name: One of the values of `Structure`.

    Returns:
        The structure.

    Raises:
        InputError: If there is none.
    """
    try:
        return Structure(name)
    except ValueError:
        raise InputError(f"Unknown structure '{name}'; expected one of {[s.value for s in Structure]}.") from None


@dataclass(frozen=True)
class KroneckerBasis:
    """A basis of Kronecker form, per group: direction (i, j) of a core is q_j p_iᵀ.

    Attributes:
        P: Input vectors in columns, each (L, R_i, R_i), float64.
        Q: Output vectors in columns, each (L, R_o, R_o), float64.
    """

    P: tuple[Tensor, ...]
    Q: tuple[Tensor, ...]

    def statistics(self) -> dict[str, Tensor]:
        """Return what an `ekfac` Fisher keeps of its basis, by name, on the CPU."""
        named = {f"kronecker_input_basis.{i}": P.cpu() for i, P in enumerate(self.P)}
        return named | {f"kronecker_output_basis.{i}": Q.cpu() for i, Q in enumerate(self.Q)}


@dataclass(frozen=True)
class GroupScores:
    """The projections of one batch in one group of layers.

    Attributes:
        x: x̃, shape (L, B, S, R_i); zero at padding.
        delta: δ̃ of the (weighted) log-likelihood, shape (L, B, S, R_o).
        gamma: Γ, shape (L, B, R_o, R_i).
        lengths: Positions per sequence that passed through the layer, shape (L, B): the real ones, times the number of
            calls; at the output head only those that predict a response token.
        halves: 0 or 1 per sequence, shape (B,).
    """

    x: Tensor
    delta: Tensor
    gamma: Tensor
    lengths: Tensor
    halves: Tensor


class Accumulator:
    """Sums the statistics of one structure over batches, per group and split half."""

    def __init__(
        self,
        structure: Structure,
        core_shapes: list[tuple[int, int, int]],
        *,
        weight_sharing: WeightSharing = WeightSharing.EXPAND,
        basis: KroneckerBasis | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.structure = structure
        self.weight_sharing = weight_sharing
        self.basis = basis
        self._rows: list[Tensor] = []
        self._row_halves: list[Tensor] = []
        self._batch_rows: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}
        for i, (layers, rows, columns) in enumerate(core_shapes):
            shapes: dict[str, tuple[int, ...]] = {"score_sum": (rows, columns)}
            if structure is Structure.DIAGONAL:
                shapes["square_sum"] = (rows, columns)
            elif structure in (Structure.KFAC, Structure.EKFAC):
                shapes |= {"input_covariance": (columns, columns), "output_covariance": (rows, rows), "input_count": ()}
                if structure is Structure.EKFAC:
                    shapes["rotated_square_sum"] = (rows, columns)
            elif structure is Structure.BLOCK:
                shapes["outer_sum"] = (rows * columns, rows * columns)
            for name, shape in shapes.items():
                # float32 for the one quadratic-in-R² sum, whose size decides the memory; float64 elsewhere.
                dtype = torch.float32 if name == "outer_sum" else torch.float64
                self.sums[f"{name}.{i}"] = torch.zeros(2, layers, *shape, dtype=dtype, device=device)

    def update(self, group: int, scores: GroupScores, weight: Tensor) -> None:
        """Add a batch.

        Args:
            group: Index of the group of layers.
            scores: Its projections.
            weight: Square root of the sequences' weights, shape (B,), which δ̃ and Γ already carry once.
        """
        for half in (0, 1):
            chosen = scores.halves == half
            if not bool(chosen.any()):
                continue
            gamma = scores.gamma[:, chosen]
            self._add("score_sum", group, half, torch.einsum("b,lboi->loi", weight[chosen].to(gamma.dtype), gamma))
            if self.structure is Structure.DIAGONAL:
                self._add("square_sum", group, half, gamma.square().sum(dim=1))
            elif self.structure is Structure.BLOCK:
                flat = gamma.flatten(-2)
                self._add("outer_sum", group, half, flat.mT @ flat)
            elif self.structure in (Structure.KFAC, Structure.EKFAC):
                self._add_kronecker(group, half, scores, chosen, weight)
                if self.structure is Structure.EKFAC and self.basis is not None:
                    P, Q = self.basis.P[group].to(gamma), self.basis.Q[group].to(gamma)
                    rotated = Q.mT.unsqueeze(1) @ gamma @ P.unsqueeze(1)
                    self._add("rotated_square_sum", group, half, rotated.square().sum(dim=1))
        if self.structure is Structure.GLOBAL:
            self._batch_rows.append(scores.gamma.transpose(0, 1).flatten(1).float().cpu())

    def finish_batch(self, halves: Tensor) -> None:
        """Close a batch after all groups were added.

        Args:
            halves: 0 or 1 per sequence, shape (B,).
        """
        if self.structure is Structure.GLOBAL:
            self._rows.append(torch.cat(self._batch_rows, dim=1))
            self._row_halves.append(halves.cpu())
            self._batch_rows.clear()

    def statistics(self) -> dict[str, Tensor]:
        """Return the sums, on the CPU."""
        result = {name: tensor.cpu() for name, tensor in self.sums.items()}
        if self.structure is Structure.GLOBAL:
            result["scores"] = torch.cat(self._rows)
            result["score_half"] = torch.cat(self._row_halves).to(torch.int8)
        if self.structure is Structure.EKFAC and self.basis is not None:
            result |= self.basis.statistics()
        return result

    def _add(self, name: str, group: int, half: int, value: Tensor) -> None:
        self.sums[f"{name}.{group}"][half] += value

    def _add_kronecker(self, group: int, half: int, scores: GroupScores, chosen: Tensor, weight: Tensor) -> None:
        x, delta, lengths = scores.x[:, chosen], scores.delta[:, chosen], scores.lengths[:, chosen]
        if self.weight_sharing is WeightSharing.REDUCE:
            # Sequences without a response token never pass through the output head; their sums are zero.
            x = x.sum(dim=2) / lengths.clamp_min(1.0).to(x.dtype)[:, :, None]
            delta = delta.sum(dim=2)
            x = x * weight[chosen].to(x.dtype)[:, None]
            lengths = (lengths > 0).to(lengths.dtype)
        else:
            x = (x * weight[chosen].to(x.dtype)[:, None, None]).flatten(1, 2)
            delta = delta.flatten(1, 2)
        self._add("input_count", group, half, lengths.double() @ weight[chosen].to(lengths.device).double().square())
        self._add("input_covariance", group, half, x.mT @ x)
        self._add("output_covariance", group, half, delta.mT @ delta)
