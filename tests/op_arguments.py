"""Valid arguments of every op, small and random, and ways to spoil them; for tests that throw anything at the ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Op:
    """An op with valid arguments.

    Attributes:
        arguments: Returns keyword arguments for a size and a seed.
        results: What of the result, and of arguments that are written to, is compared.
    """

    arguments: Callable[[int, int], dict[str, Any]]
    results: Callable[[Any, dict[str, Any]], Any] = lambda result, arguments: result


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _definite(seed: int, batch: int, n: int) -> Tensor:
    factor = _random(seed, batch, n, n + 3)
    return factor @ factor.mT / (n + 3) + 0.1 * torch.eye(n)


def _projection(size: int, seed: int) -> dict[str, Any]:
    return {
        "x": _random(seed, 3 * size, 8 * size),
        "bases": _random(seed + 1, 8 * size, size),
        "covariances": torch.zeros(size, size, dtype=torch.float64),
        "weights": torch.rand(3 * size, generator=torch.Generator().manual_seed(seed)),
    }


def _scores(size: int, seed: int) -> dict[str, Any]:
    return {
        "x": _random(seed, 4 * size, 8 * size),
        "gradient": _random(seed + 1, 4 * size, 8),
        "V": _random(seed + 2, 8 * size, size),
        "U": _random(seed + 3, 8, 3),
        "spans": torch.tensor([[0, size], [size, 4 * size]]),
        "weights": torch.rand(2, generator=torch.Generator().manual_seed(seed)),
        "squares": True,
        "covariances": True,
    }


def _cores(size: int, seed: int) -> dict[str, Any]:
    names = ("cores", "eigenvectors_out", "metric_out", "eigenvectors_in", "metric_in", "weights")
    shapes = [(2, size, 3), (2, size, size), (2, size, size), (2, 3, 3), (2, 3, 3), (2, size, 3)]
    return {name: _random(seed + i, *shape) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))}


OPS = {
    "project_accumulate": Op(_projection, lambda projected, arguments: (projected, arguments["covariances"])),
    "sequence_scores": Op(_scores),
    "filter_cores": Op(_cores),
    "generalized_eigh": Op(
        lambda size, seed: {"a": _random(seed, 3, size, size), "b": _definite(seed + 1, 3, size)},
        lambda solution, arguments: (solution.eigenvalues, solution.status),  # vectors have a free sign
    ),
    "magnitude_prune": Op(lambda size, seed: {"values": _random(seed, 2, size, 5), "density": 0.4}),
    "dare": Op(lambda size, seed: {"values": _random(seed, 2, size, 5), "density": 0.4, "seed": seed}),
    "ties": Op(lambda size, seed: {"values": _random(seed, 2, 2, size, 5), "weights": [1.0, 0.5], "density": 0.4}),
    "torch_dare": Op(
        lambda size, seed: {
            "values": [_random(seed, size, 5), _random(seed + 1, size)],
            "density": 0.4,
            "generator": torch.Generator().manual_seed(seed),
        },
        # Without a generator of its own a call goes on where the last one ended.
        lambda result, arguments: result if arguments["generator"] else [],
    ),
}


class Foreign:
    """An array of another library, which speaks DLPack and nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> object:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tensor.__dlpack_device__()


class Broken:
    """An array whose export fails."""

    def __dlpack__(self, **options: Any) -> object:
        raise BufferError("this array cannot be exported")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def _with(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    if changed.numel() and changed.is_floating_point():
        changed.view(-1)[changed.numel() // 2] = value
    return changed


def _strided(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


# Ways to give a tensor; the reference gets the second value where the op accepts the first.
SPOILED: dict[str, Callable[[Tensor], tuple[Any, Any]]] = {
    "as it is": lambda t: (t, t),
    "numpy": lambda t: (t.numpy().copy(), t),
    "DLPack": lambda t: (Foreign(t.clone()), t),
    "broken DLPack": lambda t: (Broken(), None),
    "list": lambda t: (t.tolist(), None),
    "None": lambda t: (None, None),
    "word": lambda t: ("tensor", None),
    "number": lambda t: (3.0, None),
    "float64": lambda t: (t.double(), t.double()),
    "bfloat16": lambda t: (t.bfloat16(), t.bfloat16()),
    "int32": lambda t: (t.int(), t.int()),
    "complex": lambda t: (t.to(torch.complex64), None),
    "bool": lambda t: (t.bool(), None),
    "meta": lambda t: (t.to("meta"), None),
    "sparse": lambda t: (t.to_sparse(), None),
    "transposed": lambda t: (t.mT, t.mT) if t.ndim > 1 else (t, t),
    "transposed storage": lambda t: (t.mT.contiguous().mT, t) if t.ndim > 1 else (t, t),
    "strided": lambda t: (_strided(t), t),
    "flipped": lambda t: (t.flip(-1), t.flip(-1)),
    "one less": lambda t: (t[:-1], t[:-1]),
    "empty": lambda t: (t[:0], t[:0]),
    "without columns": lambda t: (t[..., :0], t[..., :0]),
    "flattened": lambda t: (t.flatten(), t.flatten()),
    "one more dimension": lambda t: (t[None], t[None]),
    "a single element": lambda t: (t.flatten()[0] if t.numel() else t, None),
    "expanded": lambda t: (t[:1].expand(t.shape), t[:1].expand(t.shape).clone()),
    "NaN": lambda t: (_with(t, float("nan")), _with(t, float("nan"))),
    "infinity": lambda t: (_with(t, float("inf")), _with(t, float("inf"))),
    "negative": lambda t: (-t, -t),
    "huge": lambda t: (t * 1000, t * 1000),
    "needs a gradient": lambda t: (t.clone().requires_grad_(), t) if t.is_floating_point() else (t, t),
}

OTHER_VALUES: tuple[Any, ...] = (None, -1, 0, 1.0, 1.5, 2**70, float("nan"), "word", [], [0.5], np.float32(0.3), True)


def tensors_of(result: Any) -> list[Tensor]:
    """Return the tensors in a result, in order; arrays count."""
    if isinstance(result, Foreign):
        return [torch.from_dlpack(result)]
    if isinstance(result, (Tensor, np.ndarray)):
        return [torch.as_tensor(result)]
    if is_dataclass(result):
        return [tensor for field in fields(result) for tensor in tensors_of(getattr(result, field.name))]
    if isinstance(result, (list, tuple)):
        return [tensor for part in result for tensor in tensors_of(part)]
    return []
