"""Small adapters and Fishers from random scores, without any model, and a folder of valid files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from sstmerge.adapters import CoreSpace, load_adapter, save_adapter
from sstmerge.adapters.adapter import Adapter, LoraFactors
from sstmerge.fisher import Fisher, KroneckerBasis
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.structures import Accumulator, GroupScores, parse_structure

STRUCTURES = ("diagonal", "kfac", "ekfac", "block", "global")
LAYERS = {"model.layers.0.q_proj": (6, 5), "model.layers.1.q_proj": (6, 5), "model.layers.1.up_proj": (8, 6)}


@dataclass(frozen=True)
class ValidFiles:
    """Where the files lie.

    Attributes:
        folder: All of them.
        adapters: Directories by role.
        fishers: (gain, cost) by structure.
    """

    folder: Path
    adapters: dict[str, Path]
    fishers: dict[str, tuple[Path, Path]]


def synthetic_adapter(name: str, seed: int, rank: int = 2, size: float = 0.3) -> Adapter:
    """Return an adapter with scaling 1 on three layers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return size * torch.randn(shape, generator=generator)

    layers = {path: LoraFactors(draw(rank, d_in), draw(d_out, rank), 1.0) for path, (d_out, d_in) in LAYERS.items()}
    return Adapter(name, layers, base_model="pico/llama", config={"task_type": "CAUSAL_LM"})


def synthetic_fisher(space: CoreSpace, structure: str, labels: str, seed: int, sequences: int = 24) -> Fisher:
    """Return a Fisher of random activations and gradients of every layer, which went the way of collected ones."""
    shapes = [group.core_shape for group in space.groups]
    basis = KroneckerBasis(
        tuple(torch.eye(i, dtype=torch.float64).expand(layers, -1, -1).contiguous() for layers, _, i in shapes),
        tuple(torch.eye(o, dtype=torch.float64).expand(layers, -1, -1).contiguous() for layers, o, _ in shapes),
    )
    kind = parse_structure(structure)
    accumulator = Accumulator(kind, shapes, basis=basis if structure == "ekfac" else None)
    halves = torch.arange(sequences) % 2
    for i, group in enumerate(space.groups):
        x = torch.stack([_drawn(name, seed, sequences, LAYERS[name][1]) for name in group.names]) @ group.V[:, None]
        delta = (
            torch.stack([_drawn(name, seed + 100, sequences, LAYERS[name][0]) for name in group.names])
            @ group.U[:, None]
        )
        lengths = torch.full((len(group.names), sequences), 3.0)
        accumulator.update(i, GroupScores(x, delta, delta.mT @ x, lengths, halves), torch.ones(sequences))
    accumulator.finish_batch(halves)
    half = torch.full((2,), sequences / 2, dtype=torch.float64)
    metadata = {"labels": labels, "reference": "base", "model": "synthetic", "weight_sharing": "expand"}
    statistics = accumulator.statistics()
    if structure == "ekfac":
        for i, (P, Q) in enumerate(zip(basis.P, basis.Q, strict=True)):
            statistics |= {f"kronecker_input_basis.{i}": P, f"kronecker_output_basis.{i}": Q}
    return Fisher(kind, space, statistics, Counts(half, 3 * half, 3 * half, half.clone()), metadata)


def _drawn(layer: str, seed: int, sequences: int, size: int) -> torch.Tensor:
    """Return numbers (n, 3, size) that belong to a layer, whatever the space and its order."""
    generator = torch.Generator().manual_seed(1000 * seed + list(LAYERS).index(layer))
    return torch.randn(sequences, 3, size, generator=generator)


def write_valid_files(folder: Path) -> ValidFiles:
    """Write two adapters and ten Fishers."""
    adapters = {}
    for seed, role in enumerate(("utility", "safety")):
        adapters[role] = save_adapter(synthetic_adapter(role, seed), folder / role)
    space = CoreSpace.of([load_adapter(path, name=role) for role, path in adapters.items()])
    fishers = {}
    for structure in STRUCTURES:
        fishers[structure] = (folder / f"{structure}-gain.safetensors", folder / f"{structure}-cost.safetensors")
        for seed, (path, labels) in enumerate(zip(fishers[structure], ("data", "sampled"), strict=True)):
            synthetic_fisher(space, structure, labels, seed).save(path)
    return ValidFiles(folder, adapters, fishers)


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a file's tensors and metadata."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
