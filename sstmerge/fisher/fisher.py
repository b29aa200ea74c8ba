"""A Fisher: statistics of scores in a core space, with all that is needed to use them again. A file, a value, a sum."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sstmerge import batched_lu
from sstmerge.adapters import Adapter, CoreSpace
from sstmerge.atomic import atomic_file
from sstmerge.errors import FisherError
from sstmerge.fisher.contents import COUNTS, check_tensors, parse_header, parse_space
from sstmerge.fisher.structures import KroneckerBasis, Structure
from sstmerge.fisher.tensor_file import is_unaltered, save_hashed
from sstmerge.untrusted import read_tensor_headers

_METADATA_KEY = "sstmerge_fisher"
_FORMAT = 1
# What two Fishers must have in common to be added.
_SAME_KIND = ("labels", "reference", "model", "weight_sharing", "response_tokens")


@dataclass(frozen=True)
class Counts:
    """What a Fisher has seen, per split half; weighted by the sequences' weights.

    Attributes:
        sequences: Σ w, shape (2,), float64. Every draw of labels and every reference point counts as a sequence.
        tokens: Σ w · response tokens, shape (2,), float64.
        positions: Σ w · positions that entered an input covariance, shape (2,), float64.
        squared_weights: Σ w², shape (2,), float64.
    """

    sequences: Tensor
    tokens: Tensor
    positions: Tensor
    squared_weights: Tensor

    @classmethod
    def zero(cls) -> Counts:
        """Return counts of nothing."""
        return cls(*(torch.zeros(2, dtype=torch.float64) for _ in range(4)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, n) + getattr(other, n) for n in self.__dataclass_fields__))

    def half(self, index: int) -> Counts:
        """Return the counts of one half, with the other half zero."""
        mask = torch.tensor([index == 0, index == 1], dtype=torch.float64)
        return Counts(*(getattr(self, n) * mask for n in self.__dataclass_fields__))


@dataclass(frozen=True)
class Fisher:
    """Statistics of scores in a core space.

    Attributes:
        structure: What was kept of the scores.
        space: The core space the statistics belong to.
        statistics: Sums over the data, by name and group (`sstmerge.fisher.structures`); leading axis 2, split halves.
        counts: What was seen.
        metadata: Where it comes from: labels, reference, model, data, seed, draws, versions.
    """

    structure: Structure
    space: CoreSpace
    statistics: Mapping[str, Tensor]
    counts: Counts
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> float:
        """Weighted number of response tokens; every expectation is in units of one of them."""
        return float(self.counts.tokens.sum())

    @property
    def effective_sequences(self) -> float:
        """(Σ w)² / Σ w², the number of equally weighted sequences that would carry as much information.

        Draws of labels and points of a path score the same sequences again, which are no new data, so all of a sequence's
        scores count as one here. Of a sum of Fishers of different draws this is a lower bound.
        """
        scores = draws_of(self.metadata) * _points(self.metadata)
        squared = scores * float(self.counts.squared_weights.sum())
        return float(self.counts.sequences.sum()) ** 2 / squared if squared else 0.0

    def sums(self, name: str) -> list[Tensor]:
        """Return a statistic summed over both halves, one tensor per group, float64."""
        groups = range(len(self.space.groups))
        return [self.statistics[f"{name}.{i}"].sum(dim=0, dtype=torch.float64) for i in groups]

    def mean_score(self) -> Tensor:
        """Return g = E[Γ] per response token, the gradient of the mean log-likelihood, shape (D,), float64."""
        return self.space.join(self.sums("score_sum")).div_(self.tokens)

    def diagonal(self) -> Tensor:
        """Return E[Γ²] per response token, shape (D,), float64, for `diagonal` and `ekfac` (in its own basis).

        Returns:
            The diagonal.

        Raises:
            FisherError: If the structure has no such statistic.
        """
        name = {Structure.DIAGONAL: "square_sum", Structure.EKFAC: "rotated_square_sum"}.get(self.structure)
        if name is None:
            raise FisherError(f"A '{self.structure}' Fisher keeps no diagonal.")
        return self.space.join(self.sums(name)).div_(self.tokens)

    def kronecker_factors(self) -> list[tuple[Tensor, Tensor]]:
        """Return (X (L, R_i, R_i), D (L, R_o, R_o)) per group with F = X ⊗ D per response token, for kfac and ekfac.

        Returns:
            The factors, float64.

        Raises:
            FisherError: If the structure has no Kronecker factors.
        """
        if self.structure not in (Structure.KFAC, Structure.EKFAC):
            raise FisherError(f"A '{self.structure}' Fisher has no Kronecker factors.")
        return list(self._kronecker_factors)

    @cached_property
    def _kronecker_factors(self) -> tuple[tuple[Tensor, Tensor], ...]:
        # Made once, as a merge asks for them several times; the sums are new tensors, so they are divided in place.
        names = ("input_covariance", "output_covariance", "input_count")
        sums = zip(*(self.sums(name) for name in names), strict=True)
        return tuple((X.div_(count[:, None, None]), D.div_(self.tokens)) for X, D, count in sums)

    def kronecker_basis(self) -> KroneckerBasis:
        """Return the basis that an `ekfac` Fisher was collected in."""
        groups = range(len(self.space.groups))
        return KroneckerBasis(
            P=tuple(self.statistics[f"kronecker_input_basis.{i}"] for i in groups),
            Q=tuple(self.statistics[f"kronecker_output_basis.{i}"] for i in groups),
        )

    def blocks(self) -> list[Tensor]:
        """Return E[vec Γ vec Γᵀ] per response token, (L, R_o R_i, R_o R_i) per group, for `block`.

        Returns:
            The blocks, float64.

        Raises:
            FisherError: If the structure is another.
        """
        if self.structure is not Structure.BLOCK:
            raise FisherError(f"A '{self.structure}' Fisher has no blocks.")
        return [outer / self.tokens for outer in self.sums("outer_sum")]

    def scores(self) -> Tensor:
        """Return G (n, D) with F = GᵀG per response token, float32, for `global`.

        Returns:
            The scores.

        Raises:
            FisherError: If the structure is another.
        """
        if self.structure is not Structure.GLOBAL:
            raise FisherError(f"A '{self.structure}' Fisher keeps no single scores.")
        return self.statistics["scores"] / math.sqrt(self.tokens)

    def quadratic(self, vector: Tensor) -> float:
        """Return vᵀ F v per response token; half of it is the KL divergence, in nats, that a small step v causes.

        Args:
            vector: Coordinates, shape (D,).

        Returns:
            The value; for K-FAC and EK-FAC that of the approximation.
        """
        if self.structure is Structure.GLOBAL:
            return float((self.statistics["scores"] @ vector.float()).double().square().sum()) / self.tokens
        if self.structure is Structure.DIAGONAL:
            return float((self.diagonal() * vector.square()).sum())
        cores = self.space.split(vector)
        if self.structure is Structure.KFAC:
            pairs = zip(cores, self.kronecker_factors(), strict=True)
            return sum(float(((D @ core @ X) * core).sum()) for core, (X, D) in pairs)
        if self.structure is Structure.BLOCK:
            flat = [core.flatten(-2).unsqueeze(-1) for core in cores]
            return sum(float((v.mT @ block @ v).sum()) for v, block in zip(flat, self.blocks(), strict=True))
        basis = self.kronecker_basis()
        coordinates = [
            batched_lu.solve(Q, batched_lu.solve(P, core.mT).mT)
            for core, P, Q in zip(cores, basis.P, basis.Q, strict=True)
        ]
        return float((self.diagonal() * self.space.join(coordinates).square()).sum())

    def half(self, index: int) -> Fisher:
        """Return the Fisher of one split half (0: even sequences, 1: odd), for stability checks."""
        statistics = dict(self.statistics)
        for name, tensor in self.statistics.items():
            if name in ("scores", "score_half"):
                statistics[name] = tensor[self.statistics["score_half"] == index]
            elif not name.startswith("kronecker_"):
                kept = torch.zeros_like(tensor)
                kept[index] = tensor[index]
                statistics[name] = kept
        return Fisher(self.structure, self.space, statistics, self.counts.half(index), self.metadata)

    def weighted(self, factor: float) -> Fisher:
        """Return the Fisher as if every sequence had `factor` > 0 times its weight: the same, but it counts more in sums."""
        statistics = {
            name: tensor
            if name == "score_half" or name.startswith("kronecker_")
            else tensor * (math.sqrt(factor) if name == "scores" else factor)
            for name, tensor in self.statistics.items()
        }
        counts = {n: factor * getattr(self.counts, n) for n in ("sequences", "tokens", "positions")}
        squared = factor**2 * self.counts.squared_weights
        return Fisher(self.structure, self.space, statistics, Counts(**counts, squared_weights=squared), self.metadata)

    def __add__(self, other: Fisher) -> Fisher:
        """Return the Fisher of both data sets together; what was found of one of them while collecting is left out.

        Raises:
            FisherError: If the two are of different kinds or spaces.
        """
        if self.structure is not other.structure:
            raise FisherError(f"Cannot add a '{self.structure}' and a '{other.structure}' Fisher.")
        for key in _SAME_KIND:
            if self.metadata.get(key) != other.metadata.get(key):
                raise FisherError(
                    f"Cannot add Fishers with {key} = {self.metadata.get(key)!r} and {other.metadata.get(key)!r}."
                )
        other = other.in_space(self.space)
        statistics = {}
        for name, tensor in self.statistics.items():
            if name in ("scores", "score_half"):
                statistics[name] = torch.cat([tensor, other.statistics[name]])
            elif name.startswith("kronecker_"):
                if not torch.equal(tensor, other.statistics[name]):
                    raise FisherError("Cannot add EK-FAC Fishers that were collected in different eigenbases.")
                statistics[name] = tensor
            else:
                statistics[name] = tensor + other.statistics[name]
        both = (self.metadata, other.metadata)
        metadata = {
            **_without_looks(self.metadata),
            "data": [entry for one in both for entry in _as_list(one.get("data"))],
            "draws": max(map(draws_of, both)),
        }
        if penalties := [entry for one in both if "penalty" in one for entry in _as_list(one["penalty"])]:
            metadata["penalty"] = penalties
        return Fisher(self.structure, self.space, statistics, self.counts + other.counts, metadata)

    def with_penalty(self, penalty: Fisher) -> Fisher:
        """Return F_cost with another Fisher added that counts as cost, too, whatever its labels are.

        Args:
            penalty: The empirical Fisher of responses that must not become likelier, such as refusals of benign prompts.

        Returns:
            The sum, per response token of both. Its quadratic form is no KL any more; the metadata say so ("penalty"). Its
            sequences are those of F_cost: the same prompts again are no new data.

        Raises:
            FisherError: If the two are of different spaces or structures, or were taken in different ways otherwise.
        """
        data, labels = penalty.metadata.get("data"), self.metadata.get("labels")
        total = self + replace(penalty, metadata={**penalty.metadata, "labels": labels})
        own = {name: getattr(self.counts, name) for name in ("sequences", "squared_weights")}
        metadata = {**_without_looks(self.metadata), "penalty": data}
        return replace(total, counts=replace(total.counts, **own), metadata=metadata)

    def in_space(self, space: CoreSpace) -> Fisher:
        """Return the same Fisher attached to an equal space object.

        Args:
            space: A space of the same adapters, layers and bases.

        Returns:
            The Fisher.

        Raises:
            FisherError: If the bases differ.
        """
        if space is self.space:
            return self
        own, other = self.space.basis_tensors(), space.basis_tensors()
        if self.space.layer_names != space.layer_names or self.space.fingerprint != space.fingerprint:
            raise FisherError("The two Fishers were collected for different adapters or different layers.")
        for name, tensor in own.items():
            if tensor.shape != other[name].shape or not torch.allclose(tensor, other[name], rtol=1e-5, atol=1e-8):
                raise FisherError(
                    "The two Fishers were collected in different bases of one space (on different machines, say); "
                    "collect one of them again with the other as its --like."
                )
        return Fisher(self.structure, space, self.statistics, self.counts, self.metadata)

    def save(self, path: str | Path) -> None:
        """Write the Fisher as a safetensors file.

        Args:
            path: File to write; an existing one is replaced.
        """
        tensors = dict(self.statistics)
        tensors |= {f"counts.{name}": getattr(self.counts, name) for name in Counts.__dataclass_fields__}
        tensors |= self.space.basis_tensors()
        header = json.dumps({"format": _FORMAT, "structure": self.structure.value, "metadata": dict(self.metadata)})
        with atomic_file(path) as temporary:
            save_hashed(tensors, temporary, {_METADATA_KEY: header, "space": self.space.basis_description()})

    @classmethod
    def load(cls, path: str | Path, adapters: Sequence[Adapter]) -> Fisher:
        """Read a Fisher, together with the adapters it was collected for.

        Args:
            path: File that `save` wrote.
            adapters: Those adapters (by content), under any names.

        Returns:
            The Fisher.

        Raises:
            FisherError: If the file is damaged or of another kind.
        """
        header, description, tensors = _read(path)
        counts = Counts(**{name: tensors.pop(f"counts.{name}") for name in Counts.__dataclass_fields__})
        basis = {name: tensors.pop(name) for name in list(tensors) if name.startswith("basis.")}
        space = CoreSpace.from_basis(adapters, description, basis)
        return cls(Structure(header["structure"]), space, tensors, counts, header["metadata"])


def read_header(path: str | Path) -> dict[str, Any]:
    """Read what a Fisher file says about itself, without any adapter.

    Args:
        path: File that `Fisher.save` wrote.

    Returns:
        Structure, metadata, counts, adapters, layers and tensor shapes.
    """
    header, description, tensors = _read(path)
    space = json.loads(description)
    return {
        "structure": header["structure"],
        "metadata": header["metadata"],
        "counts": {name: tensors[f"counts.{name}"].tolist() for name in Counts.__dataclass_fields__},
        "adapters": space["adapters"],
        "layers": [name for group in space["groups"] for name in group["names"]],
        "tensors": {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()},
    }


def _read(path: str | Path) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    where = f"'{path}'"
    headers, metadata = read_tensor_headers(Path(path), where, FisherError)
    if _METADATA_KEY not in metadata or "space" not in metadata:
        raise FisherError(f"{where} is a safetensors file, but not a Fisher that sstmerge wrote.")
    header = parse_header(metadata[_METADATA_KEY], where, _FORMAT)
    check_tensors(header["structure"], parse_space(metadata["space"], where), headers, where)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in headers}
    except (SafetensorError, OSError) as error:
        raise FisherError(f"{where} is not a readable safetensors file: {error}.") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FisherError(f"'{name}' in {path} holds NaN or Inf; collect this Fisher again.")
    if any(bool((tensors[f"counts.{name}"] < 0).any()) for name in COUNTS):
        raise FisherError(f"{where} is damaged: it counts fewer than no sequences; collect this Fisher again.")
    if not is_unaltered(tensors, metadata, _METADATA_KEY, "space"):
        raise FisherError(
            f"{where} was altered or damaged: its contents do not match its hash; collect this Fisher again."
        )
    return header, metadata["space"], tensors


def _without_looks(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != "convergence"}


def draws_of(metadata: Mapping[str, Any]) -> int:
    """Return how many label draws each sequence was scored with; 1 where that is not said, or is no number."""
    draws = metadata.get("draws")
    return draws if type(draws) is int and 0 < draws < 2**31 else 1


def _points(metadata: Mapping[str, Any]) -> int:
    path = re.fullmatch(r"path:.*:(\d{1,9})", str(metadata.get("reference")), re.DOTALL)
    return max(1, int(path[1])) if path else 1


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
