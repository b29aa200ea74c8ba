"""Adding an adapter's weight changes to dense weights."""

from __future__ import annotations

from torch import Tensor

from sstmerge.adapters.adapter import Adapter
from sstmerge.errors import AdapterError


def changed_weight(tensor: Tensor, adapter: Adapter, name: str) -> Tensor:
    """Return a parameter of the base model with the adapter's weight change, rounded once.

    Args:
        tensor: The parameter; for adapted layers shape (d_out, d_in), or (d_in, d_out) in Conv1D layers.
        adapter: The adapter.
        name: The parameter's name, such as `model.layers.0.self_attn.q_proj.weight`.

    Returns:
        The changed weight in the shape, dtype and device of `tensor`; `tensor` itself where the adapter has no such layer.

    Raises:
        AdapterError: The weight change has another shape.
    """
    factors = adapter.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if factors is None:
        return tensor
    A, B = factors.A.to(tensor.device).double(), factors.B.to(tensor.device).double()
    change = factors.scaling * (B @ A)
    if adapter.config.get("fan_in_fan_out"):  # Conv1D keeps its weight as (d_in, d_out)
        change = change.mT
    if change.shape != tensor.shape:
        raise AdapterError(
            f"The adapter '{adapter.name}' changes '{name}' in the shape {tuple(change.shape)}, but the base model has "
            f"{tuple(tensor.shape)}: they were trained on another base model."
        )
    return (tensor.double() + change).to(tensor.dtype)
