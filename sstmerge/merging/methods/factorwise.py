"""PEFT's types that merge lora_A and lora_B apart, on adapter files.

The result depends on how a weight change is split into factors and has cross terms A_s B_t, so these methods exist for
results that are like PEFT's; `task_arithmetic`, `ties` and `dare` act on weight changes instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sstmerge.errors import InputError
from sstmerge.merging.methods import sparse
from sstmerge.merging.methods.registry import DeltaLayer, FactorLayer, LowRank, Method, Option

_PEFT = "https://huggingface.co/docs/peft/developer_guides/model_merging"


def factorwise(layer: FactorLayer, *, entrywise: Callable[..., Tensor], **options: Any) -> LowRank:
    """Merge A with the weights sign(w_t s_t) √|w_t s_t| and B with √|w_t s_t|, entry by entry.

    Args:
        layer: The layer.
        entrywise: Merges the tensors of a `DeltaLayer`.
        **options: What `entrywise` takes.

    Returns:
        B (d_out, r) and A (r, d_in), float32 or, for float64 factors, as float64 as `entrywise` gives it.

    Raises:
        InputError: The ranks differ.
    """
    ranks = {name: len(A) for name, A in zip(layer.adapters, layer.A, strict=True)}
    if len(set(ranks.values())) > 1:
        raise InputError(
            f"PEFT's linear, ties, dare and magnitude_prune add lora_A and lora_B apart, which takes adapters of one rank; "
            f"layer '{layer.name}' has {ranks}. Merge by 'task_arithmetic', 'svd', 'ties' or 'dare', which act on weight "
            "changes."
        )
    totals = layer.weights * torch.tensor(layer.scalings, dtype=torch.float64)
    roots = totals.abs().sqrt()
    A, B = (
        entrywise(_as_layer(layer, f"{layer.name}.{label}", factors, weights), **options)
        for label, factors, weights in (("lora_A", layer.A, roots.copysign(totals)), ("lora_B", layer.B, roots))
    )
    return LowRank(B=B, A=A)


def weighted_sum(layer: DeltaLayer) -> Tensor:
    """Return Σ_t w_t X_t.

    Args:
        layer: Tensors X_t.

    Returns:
        The sum, of the dtype and shape of X_t.
    """
    return torch.einsum("t,tij->ij", layer.weights, layer.deltas)


def _as_layer(layer: FactorLayer, name: str, factors: tuple[Tensor, ...], weights: Tensor) -> DeltaLayer:
    dtype = torch.float64 if any(factor.dtype == torch.float64 for factor in factors) else torch.float32
    stacked = torch.stack([factor.to(dtype) for factor in factors])
    return DeltaLayer(name, stacked, weights.to(dtype), layer.adapters, 0)


def _method(name: str, title: str, entrywise: Callable[..., Tensor], formula: str, *options: Option) -> Method:
    return Method(
        name=f"peft_{name}",
        title=title,
        function=partial(factorwise, entrywise=entrywise),
        acts_on="factors",
        formula=formula,
        paper=_PEFT,
        options=options,
        rank="largest",
        note=f"PEFT's `{name}`, for comparisons with it: the result depends on how a weight change is split into factors, "
        "and has cross terms. All adapters need one rank."
        + (" Random numbers are not PEFT's; `sstmerge.add_weighted_adapter` draws those." if "dare" in name else ""),
    )


_DENSITY = sparse.density(0.5, "Share of entries of lora_A and of lora_B that is kept.")

METHODS: tuple[Method, ...] = (
    _method(
        "linear",
        "PEFT's linear",
        weighted_sum,
        "A = Σ_t ±√|w_t s_t| A_t, B = Σ_t √|w_t s_t| B_t; A carries the sign of w_t s_t",
    ),
    _method(
        "magnitude_prune",
        "PEFT's magnitude pruning",
        sparse.magnitude_prune,
        "peft_linear of factors that are trimmed to their largest entries",
        _DENSITY,
    ),
    _method(
        "ties",
        "PEFT's TIES",
        partial(sparse.ties, trim_over="tensor", scale=1.0),
        "TIES of the A_t with weights ±√|w_t s_t|, and of the B_t with √|w_t s_t|",
        _DENSITY,
        sparse.MAJORITY_SIGN,
    ),
    _method(
        "dare_linear",
        "PEFT's DARE",
        sparse.dare,
        "peft_linear of factors of which entries are dropped at random and the others divided by the density",
        _DENSITY,
        sparse.SEED,
    ),
    _method(
        "dare_ties",
        "PEFT's DARE-TIES",
        partial(sparse.dare_ties, trim_density=1.0, scale=1.0),
        "TIES without a trim of factors of which entries are dropped at random and the others divided by the density",
        _DENSITY,
        sparse.MAJORITY_SIGN,
        sparse.SEED,
    ),
)
