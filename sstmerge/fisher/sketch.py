"""A sketch of a base model: low-rank K-FAC factors in full dimension, for adapters that do not exist yet.

For every linear layer it holds, per split half, the sums S_x = Σ x xᵀ (d_in, d_in) and S_δ = Σ δ δᵀ (d_out, d_out) as a
low-rank factor F and the residual r, what F Fᵀ lacks of the exact diagonal (`sstmerge.fisher.sketch_sums`). In the core
space of any adapters, with bases U and V, the K-FAC factors are then

    X ≈ (Vᵀ F_x)(Vᵀ F_x)ᵀ + Vᵀ diag(r_x) V        D ≈ (Uᵀ F_δ)(Uᵀ F_δ)ᵀ + Uᵀ diag(r_δ) U

so that no direction is free. The reference is the base model: when the sketch is collected there is no adapter that it
could be taken at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sstmerge.adapters import CoreSpace
from sstmerge.adapters.basis import LayerGroup
from sstmerge.errors import FisherError
from sstmerge.fisher.fisher import Counts, Fisher, draws_of
from sstmerge.fisher.sketch_sums import (
    RandomSigns,
    nystrom_factor,
    product_of,
    residual_of,
    row_squares,
    score_core,
)
from sstmerge.fisher.structures import Structure

INPUT, OUTPUT = "input", "output"
# What two sketches must have in common to be added.
_SAME_KIND = ("labels", "model", "response_tokens")


@dataclass(frozen=True)
class SketchedLayer:
    """What a sketch knows of one linear layer.

    Attributes:
        outputs: d_out.
        inputs: d_in.
        input_of: Name of the layer under which the input's sketch is kept: layers that read one tensor share it.
    """

    outputs: int
    inputs: int
    input_of: str


@dataclass(frozen=True)
class Sketch:
    """A sketch of a base model's second moments.

    Attributes:
        layers: The layers, by module path.
        signs: The test matrices.
        tensors: `input_factor.NAME` (2, d_in, s), `input_residual.NAME` (2, d_in), `output_factor.NAME` (2, d_out, s),
            `output_residual.NAME` (2, d_out), `input_count.NAME` (2,), with the split halves first; for labels from the
            data also `score_left.NAME` (d_out, q), `score_right.NAME` (d_in, s) and `score_core.NAME` (q, s).
        counts: What was seen.
        metadata: Where it comes from, as in a `Fisher`.
    """

    layers: Mapping[str, SketchedLayer]
    signs: RandomSigns
    tensors: Mapping[str, Tensor]
    counts: Counts
    metadata: Mapping[str, Any]

    def project(self, space: CoreSpace) -> Fisher:
        """Return the `kfac` Fisher of some adapters, without data and without the model.

        Args:
            space: Their core space.

        Returns:
            The Fisher, taken at the base model.

        Raises:
            FisherError: If the sketch lacks a layer of the space, or a layer has another shape.
        """
        self._check_fits(space)
        statistics = {}
        for i, group in enumerate(space.groups):
            per_layer = [self._layer_statistics(name, group, j) for j, name in enumerate(group.names)]
            for statistic in per_layer[0]:
                statistics[f"{statistic}.{i}"] = torch.stack([layer[statistic] for layer in per_layer], dim=1)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in statistics.values()):
            raise FisherError("The sketch holds NaN or Inf, so nothing can be projected from it; collect it again.")
        sketch = {"rank": self.signs.rank, "seed": self.signs.seed}
        return Fisher(Structure.KFAC, space, statistics, self.counts, {**self.metadata, "sketch": sketch})

    def __add__(self, other: Sketch) -> Sketch:
        """Return the sketch of both data sets together.

        Raises:
            FisherError: If the two are of different kinds, models, ranks or seeds.
        """
        self._check_addable(other)
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            kind, layer = name.split(".", 1)
            if kind.endswith("_factor"):
                side, pair = kind.removesuffix("_factor"), (tensor, other.tensors[name])
                product = sum((product_of(factor, self.signs) for factor in pair), torch.zeros(()))
                residuals = [sketch.tensors[f"{side}_residual.{layer}"] for sketch in (self, other)]
                diagonal = residuals[0] + residuals[1] + row_squares(pair[0]) + row_squares(pair[1])
                factor = nystrom_factor(product.to(tensor.dtype), self.signs)
                tensors |= {name: factor, f"{side}_residual.{layer}": residual_of(factor, diagonal)}
            elif kind in ("input_count", "score_left", "score_right"):
                tensors[name] = tensor + other.tensors[name]
        tensors |= score_cores(tensors, self.signs)
        data = [self.metadata.get("data"), other.metadata.get("data")]
        flat = [entry for part in data for entry in (part if isinstance(part, list) else [part])]
        draws = max(draws_of(one.metadata) for one in (self, other))
        metadata = {**self.metadata, "data": flat, "draws": draws}
        return Sketch(self.layers, self.signs, tensors, self.counts + other.counts, metadata)

    def _layer_statistics(self, name: str, group: LayerGroup, position: int) -> dict[str, Tensor]:
        """Return the statistics of a `kfac` Fisher in one layer, without the axis of layers."""
        U, V = group.U[position], group.V[position]
        shared = self.layers[name].input_of
        return {
            "input_covariance": self._moment(INPUT, shared, V),
            "output_covariance": self._moment(OUTPUT, name, U),
            "input_count": self.tensors[f"input_count.{name}"],
            "score_sum": self._score_sum(name, U, V),
        }

    def _moment(self, side: str, name: str, basis: Tensor) -> Tensor:
        """Return Bᵀ S B (2, R, R), float64, for a basis B (d, R)."""
        factor, residual = self.tensors[f"{side}_factor.{name}"], self.tensors[f"{side}_residual.{name}"]
        low_rank = (basis.to(factor.dtype).mT @ factor).double()
        exact = basis.double()
        return low_rank @ low_rank.mT + (exact * residual[:, :, None]).mT @ exact

    def _score_sum(self, name: str, U: Tensor, V: Tensor) -> Tensor:
        """Return Uᵀ G V (2, R_o, R_i), float64; every half has its share of the tokens, since G is kept as a whole.

        Sampled labels have a mean score of zero, exactly.
        """
        if f"score_left.{name}" not in self.tensors:
            return torch.zeros(2, U.shape[1], V.shape[1], dtype=torch.float64)
        left, right = self.tensors[f"score_left.{name}"].double(), self.tensors[f"score_right.{name}"].double()
        U, V = U.double(), V.double()
        if right.shape[1] == len(left):  # Ψ is the identity
            total = U.mT @ right.mT @ V
        elif left.shape[1] == len(right):  # Ω is the identity
            total = U.mT @ left @ V
        else:
            total = (U.mT @ left) @ self.tensors[f"score_core.{name}"].double() @ (right.mT @ V)
        tokens = self.counts.tokens
        return total * (tokens / tokens.sum())[:, None, None]

    def _check_fits(self, space: CoreSpace) -> None:
        missing = [name for name in space.layer_names if name not in self.layers]
        if missing:
            held = sorted({name.rsplit(".", 1)[-1] for name in self.layers})
            raise FisherError(
                f"The sketch lacks {len(missing)} of the adapters' {len(space.layer_names)} layers, such as "
                f"'{missing[0]}'; it holds {len(self.layers)} layers of the kinds {held}. Either the adapters belong to "
                "another base model, or these layers were left out when it was collected; collect a sketch of them."
            )
        for group in space.groups:
            shape = (group.U.shape[1], group.V.shape[1])
            for name in group.names:
                layer = self.layers[name]
                if (layer.outputs, layer.inputs) != shape:
                    raise FisherError(
                        f"Layer '{name}' maps {layer.inputs} to {layer.outputs} features in the sketched model, but "
                        f"{shape[1]} to {shape[0]} in the adapters: they were trained on another base model."
                    )

    def _check_addable(self, other: Sketch) -> None:
        for key in _SAME_KIND:
            if self.metadata.get(key) != other.metadata.get(key):
                raise FisherError(
                    f"Cannot add sketches with {key} = {self.metadata.get(key)!r} and {other.metadata.get(key)!r}."
                )
        own, others = ((s.signs.rank, s.signs.seed) for s in (self, other))
        if own != others:
            raise FisherError(
                f"Cannot add sketches of (rank, seed) = {own} and {others}: their test matrices differ; collect one of "
                "them again with the options of the other."
            )
        if self.layers != other.layers:
            raise FisherError(
                "Cannot add sketches of different layers; collect one of them again with the same targets."
            )


def score_cores(tensors: Mapping[str, Tensor], signs: RandomSigns) -> dict[str, Tensor]:
    """Return the middle of every score's sketch, by name.

    Args:
        tensors: `score_left.NAME` and `score_right.NAME`.
        signs: The test matrices.

    Returns:
        `score_core.NAME`, for layers in which neither side is the score itself.
    """
    names = [name.removeprefix("score_left.") for name in tensors if name.startswith("score_left.")]
    cores = {}
    for name in names:
        left, right = tensors[f"score_left.{name}"], tensors[f"score_right.{name}"]
        if right.shape[1] < len(left) and left.shape[1] < len(right):
            cores[f"score_core.{name}"] = score_core(left, signs)
    return cores


def layer_entries(layers: Mapping[str, SketchedLayer]) -> dict[str, Sequence[Any]]:
    """Return layers as plain data for JSON; the inverse is `layers_from`."""
    return {name: (layer.outputs, layer.inputs, layer.input_of) for name, layer in layers.items()}


def layers_from(entries: Mapping[str, Sequence[Any]]) -> dict[str, SketchedLayer]:
    """Return the layers that `layer_entries` described."""
    return {name: SketchedLayer(int(o), int(i), str(owner)) for name, (o, i, owner) in entries.items()}
