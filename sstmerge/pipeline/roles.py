"""Adapters and their roles in a merge: utility adapters, whose behaviour must survive, and a safety adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sstmerge.adapters import Adapter, CoreSpace, adapter_from_model, load_adapter
from sstmerge.errors import InputError

AdapterSource = str | Path | Adapter | nn.Module


@dataclass(frozen=True)
class Roles:
    """The adapters of a merge in their space.

    Attributes:
        space: The core space of all of them.
        utility: Weighted sum of the utility adapters, shape (D,).
        safety: The safety adapter, shape (D,).
        reference: The utility model as a reference expression.
    """

    space: CoreSpace
    utility: Tensor
    safety: Tensor
    reference: str


def load_roles(
    utility: AdapterSource | Sequence[AdapterSource],
    safety: AdapterSource,
    utility_weights: Sequence[float] | None = None,
    *,
    ignore_base_name: bool = False,
) -> Roles:
    """Load the adapters of a merge and build their space.

    Args:
        utility: Utility adapters.
        safety: The safety adapter.
        utility_weights: One weight per utility adapter.
        ignore_base_name: Accept different base model names.

    Returns:
        The roles.
    """
    named = load_named(utility, safety)
    space = CoreSpace.of(named, ignore_base_name=ignore_base_name)
    names = [adapter.name for adapter in named]
    return roles_in(space, names[:-1], names[-1], utility_weights)


def load_named(utility: AdapterSource | Sequence[AdapterSource], safety: AdapterSource) -> list[Adapter]:
    """Load adapters under the names of their roles: `utility` (`utility1`, … for several), last `safety`.

    Args:
        utility: Utility adapters.
        safety: The safety adapter.

    Returns:
        The adapters.
    """
    single = isinstance(utility, str | Path | Adapter | nn.Module)
    sources = [utility] if single else list(utility)  # type: ignore[arg-type]
    names = ["utility"] if len(sources) == 1 else [f"utility{i + 1}" for i in range(len(sources))]
    loaded = [_load(source, name) for source, name in zip(sources, names, strict=True)]  # type: ignore[arg-type]
    return [*loaded, _load(safety, "safety")]


def expand_reference(reference: str, roles: Roles) -> str:
    """Replace the word `utility` in a reference by the weighted sum of all utility adapters.

    Args:
        reference: A reference, such as `utility` or `path:utility:utility+safety:3`.
        roles: The adapters.

    Returns:
        The reference in terms of adapter names.
    """
    names = {adapter.name for adapter in roles.space.adapters}
    if "utility" in names and roles.reference == "utility":
        return reference
    return ":".join("+".join(_expanded(term, roles) for term in part.split("+")) for part in reference.split(":"))


def _expanded(term: str, roles: Roles) -> str:
    factor, multiplied, name = term.strip().rpartition("*")
    if name.strip() != "utility":
        return term
    if not multiplied or roles.reference == "base":
        return roles.reference
    weights = [own.rpartition("*") for own in roles.reference.split("+")]
    try:
        return "+".join(f"{float(factor) * float(weight or 1)!r}*{adapter}" for weight, _, adapter in weights)
    except ValueError:
        return term  # what reads references says what is wrong


def roles_in(space: CoreSpace, utilities: Sequence[str], safety: str, weights: Sequence[float] | None) -> Roles:
    """Return the roles of a space's adapters.

    Args:
        space: The space.
        utilities: Names of the utility adapters.
        safety: Name of the safety adapter.
        weights: One weight per utility adapter; 1 by default.

    Returns:
        The roles.

    Raises:
        InputError: If the number of weights is another than that of the utility adapters.
    """
    weights = [1.0] * len(utilities) if weights is None else list(weights)
    if len(weights) != len(utilities):
        raise InputError(f"Expected one weight per utility adapter ({len(utilities)}), but got {len(weights)}.")
    total = space.combination(dict(zip(utilities, weights, strict=True)))
    terms = [n if w == 1.0 else f"{w!r}*{n}" for w, n in zip(weights, utilities, strict=True)]
    return Roles(space, total, space.core(safety), "+".join(terms) or "base")


def with_space(roles: Roles, space: CoreSpace, weights: Sequence[float] | None) -> Roles:
    """Return the same roles in other bases of their space.

    Args:
        roles: The roles.
        space: A space of the same adapters, in the same order.
        weights: One weight per utility adapter; 1 by default.
    """
    names = [adapter.name for adapter in roles.space.adapters]
    return roles if space is roles.space else roles_in(space, names[:-1], names[-1], weights)


def _load(source: AdapterSource, name: str) -> Adapter:
    if isinstance(source, nn.Module):
        loaded = adapter_from_model(source)
    elif isinstance(source, Adapter):
        source.validate()
        loaded = source
    else:
        loaded = load_adapter(source, name=name)
    fields: Mapping[str, Any] = {f: getattr(loaded, f) for f in Adapter.__dataclass_fields__}
    return Adapter(**{**fields, "name": name})
