"""The twins of `sstmerge.ops.magnitude_prune`, `dare` and `ties`, and the random numbers that `dare` draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

Rounding = Literal["nearest", "down"]
MajoritySign = Literal["total", "frequency"]

# Problems of one shape as a tensor (batch, ...), or tensors of any shapes, one problem each.
Batch = Tensor | Sequence[Tensor]
BatchType = TypeVar("BatchType", Tensor, Sequence[Tensor])

# An integer type of every dtype's width. Without its sign bit, a number's bits are ordered like its magnitude.
_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_WORD = 0xFFFFFFFF


def magnitude_prune(values: BatchType, density: float, *, rounding: Rounding = "nearest") -> BatchType:
    """Keep the largest entries of every tensor. See `sstmerge.ops.magnitude_prune`.

    Args:
        values: (batch, ...) or a list of tensors.
        density: Share of entries that is kept.
        rounding: How `density * numel` becomes a number of entries.

    Returns:
        The pruned tensors, in the form of `values`.
    """
    return _in_form_of(values, [_prune(tensor, kept_count(tensor.numel(), density, rounding)) for tensor in values])


def dare(values: BatchType, density: float, seed: int, *, rescale: bool = True, first_stream: int = 0) -> BatchType:
    """Keep entries at random and rescale them. See `sstmerge.ops.dare`.

    Args:
        values: (batch, ...) or a list of tensors.
        density: Probability that an entry is kept.
        seed: Key of the random numbers.
        rescale: Divide what is kept by `density`.
        first_stream: Number of the first tensor's stream.

    Returns:
        The sparse tensors, in the form of `values`.
    """
    dropped = []
    for stream, tensor in enumerate(values, start=first_stream):
        kept = random_words(seed, stream, tensor.numel(), tensor.device) < keep_below(density)
        scaled = tensor.to(compute_dtype(tensor.dtype)) * dare_scale(density, rescale)
        dropped.append(torch.where(kept.view(tensor.shape), scaled, 0.0).to(tensor.dtype))
    return _in_form_of(values, dropped)


def torch_dare(values: Sequence[Tensor], density: float, *, generator: torch.Generator | None = None) -> list[Tensor]:
    """Keep entries as `torch.bernoulli` decides, and rescale them. See `sstmerge.ops.torch_dare`.

    Args:
        values: Tensors of any shapes.
        density: Probability that an entry is kept.
        generator: What is drawn from; None for torch's global generator of the device.

    Returns:
        The sparse tensors.
    """
    dropped = []
    for tensor in values:
        if tensor.device.type == "cpu":
            # A draw of bernoulli is one uniform number below the probability; to draw all and compare is three times faster.
            uniform = torch.empty(tensor.shape, dtype=compute_dtype(tensor.dtype)).uniform_(generator=generator)
            kept = uniform.lt_(probability_in(tensor.dtype, density)).to(tensor.dtype)
        else:
            probabilities = torch.full(tensor.shape, density, dtype=tensor.dtype, device=tensor.device)
            kept = torch.bernoulli(probabilities, generator=generator)
        dropped.append(kept.mul_(tensor).div_(density))
    return dropped


def probability_in(dtype: torch.dtype, density: float) -> float:
    """Return a density as `torch.bernoulli` sees it, rounded to a dtype."""
    return float(torch.tensor(density, dtype=dtype))


def ties(
    values: Sequence[BatchType],
    weights: Sequence[float] | Tensor,
    density: float,
    *,
    majority_sign_method: MajoritySign = "total",
    rounding: Rounding = "nearest",
) -> BatchType:
    """Trim, elect signs and merge what agrees. See `sstmerge.ops.ties`.

    Args:
        values: One batch per task.
        weights: One weight per task.
        density: Share of entries of every tensor that is kept.
        majority_sign_method: What elects the sign: the sum of the entries, or the number of either sign.
        rounding: How `density * numel` becomes a number of entries.

    Returns:
        The merged tensors, in the form of one batch.
    """
    weights = torch.as_tensor(weights, dtype=torch.float64).tolist()
    merged = []
    for tensors in zip(*values, strict=True):
        dtype = compute_dtype(tensors[0].dtype)
        kept = kept_count(tensors[0].numel(), density, rounding)
        trimmed = [_prune(tensor, kept).to(dtype) for tensor in tensors]
        result = _elect_and_merge(trimmed, torch.tensor(weights, dtype=dtype).tolist(), majority_sign_method)
        merged.append(result.to(tensors[0].dtype))
    return _in_form_of(values[0], merged)


def kept_count(numel: int, density: float, rounding: Rounding) -> int:
    """Return how many of `numel` entries a density keeps.

    Args:
        numel: Number of entries.
        density: In (0, 1].
        rounding: "nearest" keeps at least one entry; "down" is PEFT's rule, which may keep none.

    Returns:
        A count from 0 to `numel`.
    """
    if rounding == "down":
        return int(density * numel)
    return min(numel, max(1, round(density * numel)))


def keep_below(density: float) -> int:
    """Return the bound under which a random word of 32 bits keeps its entry, from 1 to 2³²."""
    return max(1, round(density * 2**32))


def dare_scale(density: float, rescale: bool) -> float:
    """Return the factor of what DARE keeps."""
    return 1.0 / density if rescale else 1.0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which entries of a dtype are added and scaled."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_words(seed: int, stream: int, count: int, device: torch.device) -> Tensor:
    """Return the random words of the first entries of a stream.

    Entry e has word e % 4 of the Philox block whose counter is (e // 4, stream), 64 bits each.

    Args:
        seed: The key, 64 bits.
        stream: The stream's number, 64 bits.
        count: Number of entries.
        device: Where to compute.

    Returns:
        Integers from 0 to 2³² − 1, shape (count,), int64.
    """
    groups = torch.arange((count + 3) // 4, device=device)
    high = torch.full_like(groups, stream >> 32)
    blocks = philox(
        torch.stack([groups & _WORD, groups >> 32, torch.full_like(groups, stream & _WORD), high]),
        seed & _WORD,
        seed >> 32,
    )
    return blocks.mT.reshape(-1)[:count]


def philox(counter: Tensor, key_low: int, key_high: int) -> Tensor:
    """Compute Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: Four words of 32 bits, lowest first, shape (4, n), int64.
        key_low: Low word of the key.
        key_high: High word of the key.

    Returns:
        Four random words of 32 bits for every counter, shape (4, n), int64.
    """
    c0, c1, c2, c3 = counter.unbind()
    for _ in range(10):
        # The product of two words may overflow into the sign; its bits are right all the same.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (second >> 32 & _WORD) ^ c1 ^ key_low, second & _WORD
        c2, c3 = (first >> 32 & _WORD) ^ c3 ^ key_high, first & _WORD
        key_low, key_high = (key_low + 0x9E3779B9) & _WORD, (key_high + 0xBB67AE85) & _WORD
    return torch.stack([c0, c1, c2, c3])


def _prune(tensor: Tensor, kept: int) -> Tensor:
    """Keep the `kept` largest magnitudes, those of the lowest index where magnitudes are equal; NaN is the largest."""
    flat = tensor.reshape(-1)
    bits = _BITS[tensor.dtype]
    magnitudes = flat.view(bits) & torch.iinfo(bits).max
    order = magnitudes.sort(descending=True, stable=True).indices
    pruned = torch.zeros_like(flat)
    pruned[order[:kept]] = flat[order[:kept]]
    return pruned.view(tensor.shape)


def _elect_and_merge(trimmed: Sequence[Tensor], weights: Sequence[float], method: MajoritySign) -> Tensor:
    """Merge entries that have the elected sign, task by task in order; NaN stays NaN."""
    votes = torch.zeros_like(trimmed[0])
    for tensor in trimmed:
        votes = votes + (tensor if method == "total" else (tensor > 0).to(votes) - (tensor < 0).to(votes))
    total, agreeing = torch.zeros_like(votes), torch.zeros_like(votes)
    for tensor, weight in zip(trimmed, weights, strict=True):
        agrees = torch.where(votes >= 0, tensor > 0, tensor < 0)
        total = total + torch.where(agrees | tensor.isnan(), weight * tensor, 0.0)
        agreeing = agreeing + agrees
    return total / agreeing.clamp_min(1.0)


def _in_form_of(values: BatchType, results: list[Tensor]) -> BatchType:
    if not isinstance(values, Tensor):
        return results
    return torch.stack(results) if results else values.clone()
