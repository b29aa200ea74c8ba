"""Sums of weight changes: task arithmetic, the same cut to a rank, the same as stacked factors, and a rank-one recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sstmerge.errors import InputError
from sstmerge.merging.methods.registry import CoreBatch, FactorLayer, Layers, LowRank, Method, Option
from sstmerge.merging.methods.statistics import safety_index

_TASK_ARITHMETIC = "https://arxiv.org/abs/2212.04089"


def task_arithmetic(batch: CoreBatch) -> Tensor:
    """Return Σ_t w_t C_t (Ilharco et al. 2023, https://arxiv.org/abs/2212.04089).

    Args:
        batch: The layers.

    Returns:
        Merged cores, shape (L, R_o, R_i), float64.
    """
    return torch.einsum("t,tlij->lij", batch.weights, batch.cores)


def stacked(layer: FactorLayer) -> LowRank:
    """Return the factors of all adapters side by side: B = [w_1 s_1 B_1 …], A = [A_1; …], so that B A = Σ_t w_t ΔW_t.

    Args:
        layer: The layer.

    Returns:
        B (d_out, Σ r_t) and A (Σ r_t, d_in), in the widest dtype of the adapters.
    """
    scaled = []
    for B, scaling, weight in zip(layer.B, layer.scalings, layer.weights.tolist(), strict=True):
        scaled.append((weight * scaling * B.double()).to(B.dtype))
    return LowRank(B=_concatenated(scaled, dim=1), A=_concatenated(layer.A, dim=0))


def rank_one(batch: CoreBatch, *, modules: str = "") -> Tensor:
    """Add only the leading singular direction of the safety adapter: Σ_{t≠s} w_t C_t + w_s σ_1 u_1 v_1ᵀ.

    Safety alignment with LoRA of rank one (Xue and Mirzasoleiman 2025, https://arxiv.org/abs/2507.17075), after training.

    Args:
        batch: The layers, with the index of the safety adapter.
        modules: Regular expression, searched in the module path; the safety adapter is left out of all other modules.

    Returns:
        Merged cores, shape (L, R_o, R_i), float64.
    """
    safety = safety_index(batch, "rank_one")
    left, values, right = torch.linalg.svd(batch.cores[safety], full_matrices=False)
    direction = values[:, :1, None] * left[:, :, :1] * right[:, :1, :]
    chosen = torch.tensor([bool(re.search(modules, name)) for name in batch.names], dtype=torch.float64)
    weights = batch.weights.clone()
    weights[safety] = 0.0
    others = torch.einsum("t,tlij->lij", weights, batch.cores)
    merged: Tensor = others + batch.weights[safety] * chosen[:, None, None] * direction
    return merged


def check_modules(layers: Layers, *, modules: str) -> Mapping[str, Any]:
    """Refuse a pattern that is no regular expression or that no module matches.

    Args:
        layers: All layers.
        modules: The pattern.

    Returns:
        Nothing more.

    Raises:
        InputError: The pattern is of no use.
    """
    try:
        matches = [name for name in layers.names if re.search(modules, name)]
    except re.error as error:
        raise InputError(f"modules is no regular expression: '{modules}': {error}.") from error
    if not matches:
        raise InputError(f"modules is '{modules}', which is found in no module path, such as '{layers.names[0]}'.")
    return {}


def _concatenated(factors: list[Tensor] | tuple[Tensor, ...], *, dim: int) -> Tensor:
    return torch.cat([*factors], dim=dim)  # promotes to the widest dtype


METHODS: tuple[Method, ...] = (
    Method(
        name="task_arithmetic",
        title="Task arithmetic",
        function=task_arithmetic,
        acts_on="core",
        formula="ΔW = Σ_t w_t ΔW_t",
        paper=_TASK_ARITHMETIC,
        note="Exact in ΔW, unlike PEFT's `linear`, which adds A and B apart and so adds cross terms.",
    ),
    Method(
        name="svd",
        title="Task arithmetic, cut to a rank",
        function=task_arithmetic,
        acts_on="core",
        formula="ΔW = the best approximation of rank k of Σ_t w_t ΔW_t",
        paper=_TASK_ARITHMETIC,
        note="The rank k is that of the result: the largest rank among the adapters unless it is given. Equal to PEFT's "
        "`svd`, but found through the cores, without a dense matrix.",
        rank="largest",
    ),
    Method(
        name="cat",
        title="Task arithmetic as stacked factors",
        function=stacked,
        acts_on="factors",
        formula="B = [w_1 s_1 B_1 … w_T s_T B_T], A = [A_1; …; A_T], so that B A = Σ_t w_t ΔW_t",
        paper=_TASK_ARITHMETIC,
        note="The weight change of task_arithmetic, but A is kept bit for bit and nothing is orthogonalised; the rank is "
        "Σ r_t even where adapters overlap, and cannot be chosen.",
    ),
    Method(
        name="rank_one",
        title="Rank-one safety adapter",
        function=rank_one,
        acts_on="core",
        formula="ΔW = Σ_{t≠s} w_t ΔW_t + w_s σ_1 u_1 v_1ᵀ, with σ_1 u_1 v_1ᵀ the leading singular direction of ΔW_s",
        paper="https://arxiv.org/abs/2507.17075",
        options=(
            Option(
                "modules",
                str,
                "",
                "Regular expression, such as up_proj: the safety adapter enters these modules only; all by default.",
            ),
        ),
        needs=("safety",),
        note="A baseline after the paper's finding that rank one, in up_proj only, is enough for refusal. The paper trains "
        "at rank one; this cuts a trained adapter to it, per module.",
        prepare=check_modules,
    ),
)
