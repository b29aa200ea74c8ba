"""A LoRA adapter as data: the factors of every adapted layer, free of any model or file format."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sstmerge.errors import AdapterError

# Norms of weight changes take fourth powers of entries, which must stay within float64.
LARGEST_ENTRY = 1e30


@dataclass(frozen=True)
class LoraFactors:
    """The weight change of one linear layer, `scaling * B @ A`.

    Attributes:
        A: Factor that reads the input, shape (r, d_in).
        B: Factor that writes the output, shape (d_out, r).
        scaling: PEFT's scaling, alpha / r (alpha / sqrt(r) for rsLoRA).
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rank r of the factors."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (d_out, d_in) of the weight change."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """Return the dense weight change, shape (d_out, d_in), float64; for tests and small layers only."""
        return self.scaling * (self.B.double() @ self.A.double())


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        name: Name the user gave it; used in messages.
        layers: Factors by module path in the base model, such as `model.layers.0.self_attn.q_proj`.
        base_model: The `base_model_name_or_path` it was trained on; None where it is not recorded.
        config: The fields of `adapter_config.json` that are passed on to a merged adapter (task type, target modules,
            fan_in_fan_out).
        source: Directory, hub id or model it was read from; used in messages.
    """

    name: str
    layers: Mapping[str, LoraFactors]
    base_model: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype all factors promote to."""
        dtypes = {t.dtype for layer in self.layers.values() for t in (layer.A, layer.B)}
        result = dtypes.pop()
        for other in dtypes:
            result = torch.promote_types(result, other)
        return result

    @property
    def parameter_count(self) -> int:
        """Number of entries in all factors."""
        return sum(layer.A.numel() + layer.B.numel() for layer in self.layers.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over layer names, scalings and factor bytes: equal exactly when the weight changes are stored equal."""
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            factors = self.layers[name]
            digest.update(f"{name}\0{factors.scaling!r}\0".encode())
            for tensor in (factors.A, factors.B):
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def validate(self) -> None:
        """Check that the factors can be merged.

        Raises:
            AdapterError: If there is no layer, a factor is not a matrix or holds NaN or Inf, shapes do not fit, or
                every weight change is zero.
        """
        if not self.layers:
            raise AdapterError(f"Adapter '{self.name}' ({self.source}) has no LoRA layer: there is nothing to merge.")
        nonzero = False
        for path, factors in self.layers.items():
            extremes: dict[str, float] = {}
            for label, tensor in (("lora_A", factors.A), ("lora_B", factors.B)):
                where = f"'{path}.{label}.weight' of adapter '{self.name}'"
                if tensor.dim() != 2:
                    raise AdapterError(
                        f"{where} must be a matrix, but has shape {tuple(tensor.shape)}; sstmerge merges linear layers "
                        "only (no convolutions or embeddings): retrain without this module in target_modules."
                    )
                if not tensor.is_floating_point():
                    raise AdapterError(f"{where} must hold floating-point numbers, but has dtype {tensor.dtype}.")
                extremes[label] = _largest_magnitude(tensor)
                if not math.isfinite(extremes[label]):
                    raise AdapterError(f"{where} holds NaN or Inf; the training diverged or the file is damaged.")
                if float(tensor.abs().max()) > LARGEST_ENTRY:
                    raise AdapterError(
                        f"{where} holds {float(tensor.abs().max()):.1e}, beyond {LARGEST_ENTRY:.0e}: products of such "
                        "numbers overflow. The training diverged or the file is damaged."
                    )
            if factors.A.shape[0] != factors.B.shape[1]:
                raise AdapterError(
                    f"Layer '{path}' of adapter '{self.name}' has lora_A of shape {tuple(factors.A.shape)} and lora_B "
                    f"of shape {tuple(factors.B.shape)}; the first size of A must equal the second of B."
                )
            nonzero = nonzero or (all(extremes.values()) and factors.scaling != 0)
        if not nonzero:
            raise AdapterError(
                f"Adapter '{self.name}' ({self.source}) changes nothing: every B A product is zero. It was saved before "
                "training, or its weights were not found at saving."
            )


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that orders `layers.2` before `layers.10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"[.]", name)]


def check_same_base(adapters: Sequence[Adapter], *, ignore_base_name: bool = False) -> None:
    """Check that adapters belong to the same base model.

    Args:
        adapters: The adapters that are to be merged.
        ignore_base_name: Accept different `base_model_name_or_path` values; shapes are still compared.

    Raises:
        AdapterError: If two adapters name different base models, or adapt a layer of the same name with different
            shapes.
    """
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    for adapter in adapters:
        for path, factors in adapter.layers.items():
            known = shapes.setdefault(path, (factors.shape, adapter.name))
            if known[0] != factors.shape:
                raise AdapterError(
                    f"Layer '{path}' is {known[0][0]} x {known[0][1]} in adapter '{known[1]}' but {factors.shape[0]} x "
                    f"{factors.shape[1]} in adapter '{adapter.name}': they were trained on different base models."
                )
    if ignore_base_name:
        return
    named = [(a.name, a.base_model) for a in adapters if a.base_model]
    for name, base in named[1:]:
        # A local copy and the hub id of one model differ in all but the last component.
        if _last_component(base) != _last_component(named[0][1]):
            raise AdapterError(
                f"Adapter '{named[0][0]}' was trained on '{named[0][1]}' but adapter '{name}' on '{base}'. Merge only "
                "adapters of one base model; if both names mean the same model, pass ignore_base_name=True "
                "(--ignore-base-name)."
            )


def check_names(adapters: Sequence[Adapter]) -> None:
    """Check that there are adapters and that their names tell them apart.

    Args:
        adapters: The adapters that are to be merged.

    Raises:
        AdapterError: If there is none, or two have one name.
    """
    names = [adapter.name for adapter in adapters]
    if not adapters:
        raise AdapterError("No adapter was given; a merge needs at least one.")
    if len(set(names)) != len(names):
        raise AdapterError(f"The adapters must have distinct names, but these are {names}; rename one (NAME=DIR).")


def common_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """Return the dtype that the factors of all adapters promote to."""
    dtype = adapters[0].dtype
    for adapter in adapters[1:]:
        dtype = torch.promote_types(dtype, adapter.dtype)
    return dtype


def merged_config(adapters: Sequence[Adapter], layer_names: Sequence[str]) -> dict[str, Any]:
    """Return the configuration that a merged adapter inherits.

    Args:
        adapters: The adapters; of fields that several have, the first one's value is taken.
        layer_names: Module paths of the merged adapter's layers.

    Returns:
        The fields. target_modules is left out where it would not name exactly these layers.
    """
    config: dict[str, Any] = {}
    for adapter in adapters:
        config |= {key: value for key, value in adapter.config.items() if key not in config}
    same_layers = all(set(a.layers) == set(layer_names) for a in adapters)
    targets = [a.config.get("target_modules") for a in adapters]
    listed = {frozenset(t) for t in targets if isinstance(t, list | tuple)}
    if not same_layers or len(listed) != 1 or not all(isinstance(t, list | tuple) for t in targets):
        config.pop("target_modules", None)
    return config


def _largest_magnitude(tensor: Tensor) -> float:
    """Return max |x|, NaN if there is one, in a single pass: twenty times faster than torch.isfinite and count_nonzero."""
    if not tensor.numel():
        return 0.0
    low, high = (float(extreme) for extreme in tensor.detach().aminmax())
    return high if math.isnan(high) else max(-low, high)


def _last_component(base_model: str | None) -> str:
    return (base_model or "").rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].lower()
