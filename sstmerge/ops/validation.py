"""Checks of the ops' arguments; every error is a sentence that names the argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sstmerge.errors import InputError


def as_tensor(name: str, value: Any) -> Tensor:
    """Return a tensor, or a view of anything else that speaks DLPack (cupy, numpy, JAX), without copying.

    Args:
        name: The argument's name.
        value: The argument.

    Returns:
        The tensor, detached from autograd.

    Raises:
        InputError: It is neither, or a sparse tensor.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise InputError(f"{name} must be a dense tensor, not one of layout {value.layout}: call .to_dense()")
        return value.detach()
    if hasattr(value, "__dlpack__"):
        try:
            return torch.from_dlpack(value)  # type: ignore[attr-defined]  # documented, but not exported
        except (BufferError, RuntimeError, TypeError) as error:
            raise InputError(f"{name} cannot be read through DLPack: {error}") from error
    raise InputError(f"{name} must be a torch tensor or an array with DLPack, not {type(value).__name__}")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like_name: str, like: Tensor) -> None:
    """Compare a tensor with a shape and with another tensor's dtype and device.

    Args:
        name: The argument's name.
        tensor: The argument.
        shape: The shape expected.
        like_name: Name of the other argument.
        like: The other argument, float32 or float64.

    Raises:
        InputError: Something differs, or the dtype is neither float32 nor float64.
    """
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} must have the shape {shape}, not {tuple(tensor.shape)}")
    if tensor.dtype not in {torch.float32, torch.float64}:
        raise InputError(
            f"{name} must be float32 or float64, not {tensor.dtype}: convert it with .float() or .double()"
        )
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise InputError(
            f"{name} ({tensor.dtype} on {tensor.device}) must have the dtype and device of {like_name} "
            f"({like.dtype} on {like.device})"
        )
