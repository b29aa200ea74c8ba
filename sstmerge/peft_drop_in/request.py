"""What a call asks for, checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast, get_args

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora import LoraModel
from torch import nn

from sstmerge.errors import AdapterError, InputError
from sstmerge.peft_drop_in.entrywise import Kind, MajoritySign
from sstmerge.peft_drop_in.layers import Layer, Parts, parts_of

# PEFT's types. The first kind merges lora_A and lora_B apart; the second acts on dense weight changes.
FACTOR_TYPES: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
DENSE_TYPES: dict[str, Kind] = {f"{kind}_svd": kind for kind in get_args(Kind) if kind != "linear"}
# Ours: on cores, in which a weight change is U C Vᵀ exactly.
CORE_TYPES = ("linear_exact", "core_magnitude_prune", "core_ties", "core_dare_linear", "core_dare_ties", "sst")
TYPES = (*FACTOR_TYPES, "cat", "svd", *DENSE_TYPES, *CORE_TYPES)
# The types whose result is Σ w_t ΔW_t, so that biases can be added alike.
SUMS = ("linear", "cat", "svd", "linear_exact")
_DRIVERS = (None, "gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True)
class Request:
    """A checked call.

    Attributes:
        tuner: The model's `LoraModel`.
        parts: The tuner's parts.
        layers: Its LoRA layers that any of the adapters has, in PEFT's order.
        adapters: Names of the adapters.
        weights: One weight per adapter.
        name: Name of the new adapter.
        kind: One of `TYPES`.
        svd_rank: Rank asked for; None where it was not given.
        svd_clamp: Quantile at which the factors of an SVD are clamped; None for no clamping.
        density: Share of entries that is kept, 1 where the type keeps all.
        majority_sign_method: What elects a sign.
    """

    tuner: LoraModel
    parts: Parts
    layers: tuple[Layer, ...]
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    name: str
    kind: str
    svd_rank: int | None
    svd_clamp: float | None
    density: float
    majority_sign_method: MajoritySign


def read_request(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    *,
    svd_rank: int | None,
    svd_clamp: float | None,
    svd_driver: str | None,
    density: float | None,
    majority_sign_method: str,
) -> Request:
    """Check the arguments of `sstmerge.add_weighted_adapter` against the model.

    Args:
        model: A `PeftModel` or `LoraModel`.
        adapters: Names of adapters in it.
        weights: One weight per adapter.
        adapter_name: Name of the new adapter.
        combination_type: One of `TYPES`.
        svd_rank: Rank of the result.
        svd_clamp: Quantile at which factors are clamped.
        svd_driver: Name of a cuSOLVER driver; has no effect.
        density: Share of entries that is kept.
        majority_sign_method: "total" or "frequency".

    Returns:
        The request.

    Raises:
        InputError: An argument is unusable; the message says which and how to fix it.
    """
    tuner = _tuner(model)
    names = _adapter_names(tuner, adapters)
    numbers = _weights(weights, names)
    _check_new_name(tuner, adapter_name)
    if combination_type not in TYPES:
        raise InputError(
            f"Invalid combination_type: '{combination_type}'. Expected one of PEFT's types {', '.join(TYPES[:11])}, or of "
            f"sstmerge's {', '.join(CORE_TYPES)}."
        )
    if svd_rank is not None and (not isinstance(svd_rank, int) or isinstance(svd_rank, bool) or svd_rank < 1):
        raise InputError(f"svd_rank must be a whole number of at least 1, or None, but is {svd_rank!r}.")
    if svd_clamp is not None and not (_is_number(svd_clamp) and 0.5 < svd_clamp <= 1):
        raise InputError(
            f"svd_clamp is the quantile of the factors' entries at which they are clamped, above 0.5 and up to 1, but is "
            f"{svd_clamp!r}; at a lower quantile every entry would be clamped."
        )
    if svd_driver not in _DRIVERS:
        raise InputError(f"svd_driver must be one of {list(_DRIVERS)}, but is {svd_driver!r}.")
    if majority_sign_method not in get_args(MajoritySign):
        raise InputError(
            f"majority_sign_method must be one of {list(get_args(MajoritySign))}, but is {majority_sign_method!r}."
        )
    kind = _effective_type(combination_type, names, svd_rank, svd_clamp)
    parts = parts_of(tuner)
    layers = tuple(layer for layer in parts.layers if layer.members(names))
    if not layers:
        raise InputError(f"The adapters {list(names)} have no LoRA layer in this model; there is nothing to merge.")
    return Request(
        tuner=tuner,
        parts=parts,
        layers=layers,
        adapters=names,
        weights=numbers,
        name=adapter_name,
        kind=kind,
        svd_rank=svd_rank,
        svd_clamp=None if svd_clamp is None else float(svd_clamp),
        density=_density(density, kind),
        majority_sign_method=cast(MajoritySign, majority_sign_method),
    )


def _tuner(model: nn.Module) -> LoraModel:
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, LoraModel) or isinstance(tuner, AdaLoraModel):
        raise AdapterError(
            f"Expected a peft.PeftModel with LoRA adapters, or its LoraModel, but got a {type(model).__name__}"
            + (f" around a {type(tuner).__name__}." if tuner is not model else ".")
        )
    return tuner


def _adapter_names(tuner: LoraModel, adapters: Sequence[str]) -> tuple[str, ...]:
    if isinstance(adapters, str) or not all(isinstance(name, str) for name in adapters):
        raise InputError(f"adapters must be a list of adapter names, but is {adapters!r}.")
    if not adapters:
        raise InputError("No adapter was given: adapters is empty. A merge needs at least one.")
    for name in adapters:
        if name not in tuner.peft_config:
            raise InputError(f"Adapter {name} does not exist: the model has {sorted(tuner.peft_config)}.")
    return tuple(adapters)


def _weights(weights: Any, adapters: Sequence[str]) -> tuple[float, ...]:
    numbers = weights.tolist() if isinstance(weights, torch.Tensor) else list(weights)
    if len(numbers) != len(adapters):
        raise InputError(
            f"There are {len(adapters)} adapters ({', '.join(adapters)}) but {len(numbers)} weights; give one weight per "
            "adapter, in the same order."
        )
    numbers = [n.item() if isinstance(n, torch.Tensor) and n.numel() == 1 else n for n in numbers]
    for number, name in zip(numbers, adapters, strict=True):
        if not _is_number(number) or not math.isfinite(number):
            raise InputError(f"The weight of adapter '{name}' must be a finite number, but is {number!r}.")
    return tuple(float(number) for number in numbers)


def _check_new_name(tuner: LoraModel, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise InputError(
            f"adapter_name must be a name without a dot, but is {name!r}: it becomes part of module names."
        )
    if name in tuner.peft_config:
        raise InputError(
            f"The model already has an adapter '{name}'. Nothing was merged: give another adapter_name, or call "
            f"model.delete_adapter('{name}') first. (PEFT's own function would return here without a word.)"
        )


def _effective_type(kind: str, adapters: Sequence[str], svd_rank: int | None, svd_clamp: float | None) -> str:
    """Return the type that is carried out: like PEFT, `linear` for a single adapter.

    Except where the user asked for a smaller rank or for clamping, which `linear` would ignore.
    """
    if len(adapters) > 1 or kind in CORE_TYPES:
        return kind
    if kind.endswith("svd") and (svd_rank is not None or svd_clamp is not None):
        return "svd"
    return "linear"


def _density(density: float | None, kind: str) -> float:
    needed = kind not in (*SUMS, "sst")
    if density is None:
        if needed:
            raise InputError(
                f"combination_type '{kind}' needs a density, the share of entries that is kept, in (0, 1]."
            )
        return 1.0
    if not _is_number(density) or not 0 < density <= 1:
        raise InputError(f"density is the share of entries that is kept, above 0 and up to 1, but is {density!r}.")
    return float(density) if needed else 1.0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
