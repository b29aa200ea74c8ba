"""`add_weighted_adapter` with PEFT's signature and meaning, as a function and in place of PEFT's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from torch import nn

from sstmerge.errors import InputError
from sstmerge.fisher import Fisher
from sstmerge.merging import Selection
from sstmerge.peft_drop_in.compatibility import check_adapters
from sstmerge.peft_drop_in.cores import merged_adapter
from sstmerge.peft_drop_in.insertion import insert, new_config
from sstmerge.peft_drop_in.merging import factor_dtype, merged_factors, new_rank
from sstmerge.peft_drop_in.request import CORE_TYPES, Request, read_request

_LOCK = threading.Lock()
_DEPTH = 0
_ORIGINAL: Any = None


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    gain: Fisher | str | Path | None = None,
    cost: Fisher | str | Path | None = None,
    rule: str = "project",
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    damping: float | None = None,
) -> None:
    """Merge adapters of a live PEFT model into a new adapter of it.

    Takes the place of `peft.LoraModel.add_weighted_adapter`: the arguments up to `majority_sign_method` are PEFT's, in
    PEFT's order and with PEFT's meaning, and DARE draws the very numbers that PEFT draws from torch's generator. What
    differs on purpose is listed in docs/PEFT.md. The active adapter, the trainability of what is there and the training
    mode stay as they are; the merged adapter keeps the dtype of its sources and has scaling 1. If anything is wrong,
    nothing is changed.

    Args:
        model: A `peft.PeftModel` with LoRA adapters, or its `LoraModel`.
        adapters: Names of the adapters.
        weights: One weight per adapter; may be negative.
        adapter_name: Name of the new adapter.
        combination_type: PEFT's `linear`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` merge lora_A and
            lora_B apart (the result depends on how a weight change is split into factors, and has cross terms); `cat`
            and `svd` are the exact sum of weight changes, concatenated or cut to a rank; `ties_svd`, `dare_linear_svd`,
            `dare_ties_svd` and `magnitude_prune_svd` act on dense weight changes, one layer at a time, and are cut to a
            rank. Ours act on the cores of the weight changes: `linear_exact` (the sum, without loss), `core_ties`,
            `core_dare_linear`, `core_dare_ties`, `core_magnitude_prune`, and `sst`, which merges the last adapter, the
            safety adapter, into the weighted sum of the others by measured effect.
        svd_rank: Rank of the result of types with an SVD, the largest rank of the adapters by default; of ours, which are
            without loss by default. Layers of lower rank are padded with zeros.
        svd_clamp: Quantile at which the entries of U S and Vᵀ are clamped.
        svd_full_matrices: Has no effect: no SVD here forms more than is used.
        svd_driver: Has no effect, for the same reason.
        density: Share of entries that is kept, in (0, 1]; for all types but sums and `sst`.
        majority_sign_method: "total" or "frequency": what elects a sign in types with `ties`.
        gain: F_gain of these adapters or its file; for `sst`.
        cost: F_cost of these adapters or its file; for `sst`.
        rule: `project`, `wiener` or `joint`; for `sst`.
        selection: Directions that are kept; for `sst`.
        damping: Relative damping of F_cost; for `sst`.

    Raises:
        InputError: An argument, an adapter or a Fisher is unusable (a ValueError, as in PEFT). The message says which.
    """
    del svd_full_matrices
    request = read_request(
        model,
        adapters,
        weights,
        adapter_name,
        combination_type,
        svd_rank=svd_rank,
        svd_clamp=svd_clamp,
        svd_driver=svd_driver,
        density=density,
        majority_sign_method=majority_sign_method,
    )
    if request.kind != "sst" and (gain is not None or cost is not None):
        raise InputError(f"gain and cost belong to combination_type 'sst', but it is '{combination_type}'.")
    if request.kind in CORE_TYPES and svd_clamp is not None:
        raise InputError(
            f"svd_clamp belongs to PEFT's types with an SVD, but combination_type is '{combination_type}'."
        )
    check_adapters(request)
    if request.kind in CORE_TYPES:
        _add_core_type(request, gain=gain, cost=cost, rule=rule, selection=selection, damping=damping)
        return
    rank = new_rank(request)
    insert(request, new_config(request, rank), lambda layer: merged_factors(request, layer, rank))


def _add_core_type(request: Request, **options: Any) -> None:
    merged = merged_adapter(request, **options)
    rank = next(iter(merged.layers.values())).rank

    def factors(layer: Any) -> Any:
        found = merged.layers.get(layer.path)
        if found is None:  # no adapter changes this layer
            return None
        dtype, device = factor_dtype(request, layer), layer.parameters(request.name)[0].device
        return found.A.to(device, dtype), found.B.to(device, dtype)

    insert(request, new_config(request, rank), factors)


@contextmanager
def peft_backend() -> Iterator[None]:
    """Put `sstmerge.add_weighted_adapter` in the place of PEFT's `LoraModel.add_weighted_adapter` inside the block.

    Blocks may be nested. The class is patched, so that all threads of the process see it: it comes into force when the first
    block is entered and PEFT's function returns when the last one is left, whichever thread they are in.

    Yields:
        Nothing.
    """
    global _DEPTH, _ORIGINAL
    with _LOCK:
        if _DEPTH == 0:
            _ORIGINAL = LoraModel.add_weighted_adapter
            LoraModel.add_weighted_adapter = add_weighted_adapter
        _DEPTH += 1
    try:
        yield
    finally:
        with _LOCK:
            _DEPTH -= 1
            if _DEPTH == 0:
                LoraModel.add_weighted_adapter = _ORIGINAL
