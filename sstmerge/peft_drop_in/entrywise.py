"""Pruning, dropping and electing signs, entry by entry, with PEFT's meaning.

For anything that PEFT's types act on: lora_A, lora_B and dense weight changes. Sums run in float32 (float64 for float64)
whatever the dtype of the tensors, as PEFT's do. Formulas: TIES, https://arxiv.org/abs/2306.01708, and DARE,
https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sstmerge import ops

MajoritySign = Literal["total", "frequency"]
Kind = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]


def merge(
    kind: Kind,
    tensors: Iterable[Tensor],
    weights: Sequence[float],
    density: float = 1.0,
    majority_sign_method: MajoritySign = "total",
    *,
    in_place: bool = False,
) -> Tensor:
    """Merge tensors of one shape.

    Pruning keeps `int(density * numel)` entries of every tensor. Where entries at the threshold have equal magnitudes,
    those of the lowest index stay; PEFT leaves that to `torch.topk`.

    Args:
        kind: What to do with the entries.
        tensors: One tensor per adapter, any shape and floating dtype; all but those of `ties` and `dare_ties`
            are consumed one by one.
        weights: One weight per tensor.
        density: Share of entries that is kept, in (0, 1]; not used by `linear`.
        majority_sign_method: What elects the sign: the sum of the entries, or the number of either sign.
        in_place: Whether the tensors may be overwritten.

    Returns:
        The merged tensor, float32 (float64 for float64), the tensors' shape.
    """
    if kind == "ties":
        return _ties([_widen(tensor) for tensor in tensors], weights, density, majority_sign_method)
    if kind == "dare_ties":
        dropped = [_widen(drop_and_rescale(tensor, density, in_place=in_place)) for tensor in tensors]
        return _ties(dropped, weights, 1.0, majority_sign_method)
    total = torch.zeros(())
    for position, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        if kind == "magnitude_prune":
            term = ops.magnitude_prune([tensor], density, rounding="down")[0]
        else:
            term = drop_and_rescale(tensor, density, in_place=in_place) if kind == "dare_linear" else tensor
        total = total.add_(term, alpha=weight) if position else _widen(term) * weight
    return total


def drop_and_rescale(tensor: Tensor, density: float, *, in_place: bool = False) -> Tensor:
    """Keep every entry with probability `density` and divide what is kept by it.

    Draws from torch's global generator of the tensor's device, number for number as PEFT's `torch.bernoulli` does: with the
    same seed the same entries stay. Rounded to the tensor's dtype before anything is added, as in PEFT.

    Args:
        tensor: Any shape.
        density: Probability that an entry is kept, in (0, 1]; 1 draws nothing.
        in_place: Whether `tensor` may be overwritten.

    Returns:
        The sparse tensor, the dtype and shape of `tensor`; `tensor` itself at density 1.
    """
    if density >= 1:
        return tensor
    return ops.torch_dare([tensor], density, in_place=in_place)[0]


def _ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float, method: MajoritySign) -> Tensor:
    return ops.ties([[tensor] for tensor in tensors], weights, density, majority_sign_method=method, rounding="down")[0]


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(_sum_dtype(tensor))
