"""What every type makes of one layer: merged matrices A and B with scaling 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sstmerge.merging.low_rank import weighted_sum_svd
from sstmerge.merging.truncated_svd import truncated_svd
from sstmerge.peft_drop_in import entrywise
from sstmerge.peft_drop_in.layers import Layer
from sstmerge.peft_drop_in.request import DENSE_TYPES, FACTOR_TYPES, SUMS, Request

Triplets = tuple[Tensor, Tensor, Tensor]


def merged_factors(request: Request, layer: Layer, rank: int) -> tuple[Tensor, Tensor]:
    """Merge one layer by one of PEFT's types.

    Args:
        request: The request.
        layer: A layer that at least one of the adapters has.
        rank: Rank of the new adapter, which types with an SVD cut to.

    Returns:
        A (k, d_in) and B (d_out, k) with k up to `rank`, in the common dtype of the layer's factors.
    """
    dtype = factor_dtype(request, layer)
    if request.kind in FACTOR_TYPES:
        A, B = _merge_factors(request, layer)
    elif request.kind == "cat":
        A, B = _concatenate(request, layer)
    else:
        svd = _svd_of_sum if request.kind == "svd" else _svd_of_dense
        A, B = _split(svd(request, layer, rank), request.svd_clamp)
    return A.to(dtype), B.to(dtype)


def merged_bias(request: Request, layer: Layer) -> Tensor | None:
    """Return Σ_t w_t s_t b_t, the merged bias of lora_B, for types that are sums.

    Args:
        request: The request.
        layer: The layer.

    Returns:
        Shape (d_out,), float32 or better; None where no adapter has such a bias.
    """
    if request.kind not in SUMS:
        return None
    total: Tensor | None = None
    for index in layer.members(request.adapters):
        bias = layer.bias(request.adapters[index])
        if bias is not None:
            scaling = float(layer.module.scaling[request.adapters[index]])
            term = bias.detach().to(torch.promote_types(bias.dtype, torch.float32)) * (request.weights[index] * scaling)
            total = term if total is None else total + term
    return total


def factor_dtype(request: Request, layer: Layer) -> torch.dtype:
    """Return the dtype that the factors of a layer promote to, over all adapters.

    Args:
        request: The request.
        layer: The layer.

    Returns:
        The dtype of the merged factors.
    """
    dtypes = [t.dtype for i in layer.members(request.adapters) for t in layer.parameters(request.adapters[i])]
    result = dtypes[0]
    for other in dtypes[1:]:
        result = torch.promote_types(result, other)
    return result


def _merge_factors(request: Request, layer: Layer) -> tuple[Tensor, Tensor]:
    """Merge lora_A and lora_B apart, each with the square root of weight and scaling; A carries the sign."""
    members = layer.members(request.adapters)
    factors = [layer.factors(request.adapters[index]) for index in members]
    totals = [request.weights[index] * f.scaling for index, f in zip(members, factors, strict=True)]
    roots = [math.sqrt(abs(total)) for total in totals]
    signed = [math.copysign(root, total) for root, total in zip(roots, totals, strict=True)]
    kind, options = FACTOR_TYPES[request.kind], (request.density, request.majority_sign_method)
    A = entrywise.merge(kind, [f.A for f in factors], signed, *options)
    B = entrywise.merge(kind, [f.B for f in factors], roots, *options)
    return A, B


def _concatenate(request: Request, layer: Layer) -> tuple[Tensor, Tensor]:
    members = layer.members(request.adapters)
    factors = [layer.factors(request.adapters[index]) for index in members]
    A = [f.A * (request.weights[index] * f.scaling) for index, f in zip(members, factors, strict=True)]
    return torch.cat(A), torch.cat([f.B for f in factors], dim=1)


def _svd_of_sum(request: Request, layer: Layer, rank: int) -> Triplets:
    members = layer.members(request.adapters)
    factors = [layer.factors(request.adapters[index]) for index in members]
    weights = [request.weights[index] * f.scaling for index, f in zip(members, factors, strict=True)]
    rank = min(rank, sum(f.rank for f in factors), *factors[0].shape)
    return weighted_sum_svd([f.A for f in factors], [f.B for f in factors], weights, rank)


def _svd_of_dense(request: Request, layer: Layer, rank: int) -> Triplets:
    members = layer.members(request.adapters)
    names = [request.adapters[index] for index in members]
    kind = DENSE_TYPES[request.kind]
    # Where they are consumed one by one, all dense weight changes are formed in the same memory.
    memory = None if kind in ("ties", "dare_ties") else layer.memory_for_delta(names[0])
    deltas = (layer.delta(name, out=memory) for name in names)
    merged = entrywise.merge(
        kind,
        deltas,
        [request.weights[index] for index in members],
        request.density,
        request.majority_sign_method,
        in_place=True,
    )
    matrix = layer.as_matrix(merged)
    rows = torch.cat([layer.factors(name).A for name in names])
    return truncated_svd(matrix, min(rank, *matrix.shape), rows.mT)


def _split(triplets: Triplets, clamp: float | None) -> tuple[Tensor, Tensor]:
    """Split U S Vᵀ as PEFT does: B = U S and A = Vᵀ, both clamped at a quantile of all their entries."""
    left, values, right = triplets
    A, B = right.mT, left * values
    if clamp is not None:
        highest = quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-highest, highest), B.clamp(-highest, highest)
    return A, B


def quantile(values: Tensor, share: float) -> float:
    """Return a quantile by linear interpolation, as `torch.quantile` does, which stops at 16 million entries.

    Args:
        values: Shape (n,).
        share: In [0, 1].

    Returns:
        The quantile.
    """
    position = share * (values.numel() - 1)
    below = math.floor(position)
    low = float(values.kthvalue(below + 1).values)
    high = float(values.kthvalue(min(below + 2, values.numel())).values)
    return low + (position - below) * (high - low)


def new_rank(request: Request) -> int:
    """Return the rank of the new adapter, by PEFT's rules.

    Args:
        request: A request for one of PEFT's types.

    Returns:
        The adapters' rank where factors are added, the sum of the ranks for `cat`, and `svd_rank` or the largest rank for
        types with an SVD.
    """
    ranks: list[int] = []
    for name in request.adapters:
        config = request.tuner.peft_config[name]
        ranks.append(max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r)
    if request.kind == "cat":
        return sum(ranks)
    if request.kind.endswith("svd") and request.svd_rank is not None:
        return request.svd_rank
    return int(max(ranks))
