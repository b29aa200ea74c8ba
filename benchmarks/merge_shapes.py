"""Adapters and Fishers of the true shapes of real models, filled with random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.fisher.fisher import Counts, Fisher
from sstmerge.fisher.structures import Structure

SEQUENCES, TOKENS_PER_SEQUENCE = 128, 16


@dataclass(frozen=True)
class ModelShape:
    """The seven adapted linear layers of a Llama block, and the number of blocks."""

    blocks: int
    hidden: int
    intermediate: int
    key_value: int

    def block(self) -> dict[str, tuple[int, int]]:
        """Return (d_out, d_in) of every module of a block."""
        hidden, inner = self.hidden, self.intermediate
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (self.key_value, hidden),
            "self_attn.v_proj": (self.key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def parameters(self, rank: int) -> int:
        """Return the number of parameters of one adapter."""
        return self.blocks * rank * sum(rows + columns for rows, columns in self.block().values())


MODELS = {
    "SmolLM2-135M": ModelShape(30, 576, 1536, 192),
    "Llama-3.2-1B": ModelShape(16, 2048, 8192, 512),
    "Llama-2-7B": ModelShape(32, 4096, 11008, 4096),
    "Llama-2-13B": ModelShape(40, 5120, 13824, 5120),
    "Llama-2-70B": ModelShape(80, 8192, 28672, 1024),
}


def random_adapter(
    name: str, shape: ModelShape, rank: int, *, dtype: torch.dtype, device: torch.device, blocks: int | None = None
) -> Adapter:
    """Return an adapter whose factors are pieces of one pool of normal random numbers, from a place of its own each.

    Args:
        name: Name; it decides the numbers.
        shape: The model.
        rank: Rank r.
        dtype: Dtype of the factors.
        device: Where they lie.
        blocks: Blocks, fewer than the model's if need be.

    Returns:
        The adapter.
    """
    generator = torch.Generator().manual_seed(sum(name.encode()))
    largest = rank * max(max(pair) for pair in shape.block().values())
    pool = (0.02 * torch.randn(2 * largest + 2**16, generator=generator)).to(device=device, dtype=dtype)

    def factor(rows: int, columns: int) -> Tensor:
        start = int(torch.randint(len(pool) - rows * columns, (), generator=generator))
        return pool[start : start + rows * columns].clone().view(rows, columns)

    layers = {
        f"model.layers.{block}.{module}": LoraFactors(A=factor(rank, d_in), B=factor(d_out, rank), scaling=2.0)
        for block in range(blocks or shape.blocks)
        for module, (d_out, d_in) in shape.block().items()
    }
    return Adapter(
        name, layers, base_model="random", config={"target_modules": [m.split(".")[1] for m in shape.block()]}
    )


def random_fisher(space: CoreSpace, structure: str, seed: int, sequences: int = SEQUENCES) -> Fisher:
    """Return a Fisher of random numbers with a spectrum that falls; `global` keeps sequences x D scores."""
    generator = torch.Generator().manual_seed(seed)
    device = space.groups[0].output_transform.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * torch.linspace(1, 0.1, shape[-1])

    def covariance(layers: int, size: int) -> Tensor:
        """Return Σ z zᵀ of both halves, (2, L, size, size)."""
        root = normal(2, layers, 2 * size, size).double()
        return root.mT @ root

    statistics: dict[str, Tensor] = {}
    for i, (layers, rows, columns) in enumerate(group.core_shape for group in space.groups):
        statistics[f"score_sum.{i}"] = normal(2, layers, rows, columns).double()
        if structure == Structure.DIAGONAL:
            statistics[f"square_sum.{i}"] = normal(2, layers, rows, columns).double().square()
        elif structure == Structure.KFAC:
            statistics[f"input_covariance.{i}"] = covariance(layers, columns)
            statistics[f"output_covariance.{i}"] = covariance(layers, rows)
            statistics[f"input_count.{i}"] = torch.full((2, layers), 2.0 * columns, dtype=torch.float64)
    if structure == Structure.GLOBAL:
        statistics["scores"] = torch.randn(sequences, space.size, generator=generator)
        statistics["score_half"] = (torch.arange(sequences) % 2).to(torch.int8)
    half = torch.full((2,), sequences / 2, dtype=torch.float64)
    counts = Counts(half, half * TOKENS_PER_SEQUENCE, half * TOKENS_PER_SEQUENCE, half.clone())
    on_device = {name: tensor.to(device) for name, tensor in statistics.items()}
    return Fisher(Structure(structure), space, on_device, counts, {"weight_sharing": "expand", "reference": "utility"})
