"""An aligned model and the base model it came from, read one layer at a time, for SafeLoRA and its relatives.

With V = W_aligned − W_base of a layer, C = V Vᵀ / ‖V‖_F is SafeLoRA's cheap stand-in for the projector on the columns of V
(Hsu et al. 2024, https://arxiv.org/abs/2405.16833). It is no projector: not idempotent, and its scale is that of V. It is
never formed: C B = V (Vᵀ B) / ‖V‖_F costs two products with V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sstmerge.adapters import Adapter, LoraFactors
from sstmerge.errors import AdapterError, InputError
from sstmerge.untrusted import read_json, read_tensor_headers

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class Comparison:
    """How C ΔW of a layer compares with ΔW.

    Attributes:
        cosine: ⟨C ΔW, ΔW⟩ / (‖C ΔW‖ ‖ΔW‖), in [0, 1] because C is positive semidefinite.
        distance: ‖C ΔW − ΔW‖_F / √(d_out d_in), the root mean square of the entries.
    """

    cosine: float
    distance: float


class Checkpoint:
    """The weights of a model in safetensors files, read one tensor at a time.

    Attributes:
        source: Where it was read from, for messages.
        files: File of every tensor, by tensor name.
    """

    def __init__(self, source: str | Path, role: str) -> None:
        path = Path(source).expanduser()
        self.source = f"the {role} model '{source}'"
        self.files = _locate(path, self.source)

    def key(self, layer: str) -> str:
        """Return the name of a layer's weight.

        A checkpoint that was saved from the bare backbone lacks the first component of all module paths; in that case,
        and only then, the name without it is taken.

        Args:
            layer: Module path, as in an adapter.

        Returns:
            The tensor name.

        Raises:
            InputError: The checkpoint has no such tensor.
        """
        prefix, _, rest = layer.partition(".")
        if f"{layer}.weight" in self.files:
            return f"{layer}.weight"
        if f"{rest}.weight" in self.files and not any(name.startswith(f"{prefix}.") for name in self.files):
            return f"{rest}.weight"
        raise InputError(
            f"The adapters change '{layer}', but {self.source} has no tensor '{layer}.weight' (it has "
            f"{len(self.files)} others, such as '{min(self.files)}'); give the model that the adapters were trained on."
        )

    def shape(self, layer: str) -> tuple[int, ...]:
        """Return the shape of a layer's weight, without reading the weight."""
        key = self.key(layer)
        with safe_open(self.files[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def read(self, layer: str) -> Tensor:
        """Read a layer's weight.

        Args:
            layer: Module path.

        Returns:
            The weight in the file's shape, float32.

        Raises:
            InputError: The weight is quantised or holds NaN or Inf.
        """
        key = self.key(layer)
        with safe_open(self.files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise InputError(
                f"'{key}' of {self.source} has dtype {tensor.dtype}: a difference of quantised weights means nothing; give "
                "checkpoints in bfloat16, float16 or float32."
            )
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"'{key}' of {self.source} holds NaN or Inf; the file is damaged.")
        return tensor


@dataclass(frozen=True)
class AlignedPair:
    """An aligned model and its base, with the adapters that are to be compared with their difference.

    Attributes:
        aligned: Directory (or single .safetensors file) of the aligned model, such as a chat model.
        base: The same of the model it was aligned from.
        adapters: All adapters of the merge.

    Raises:
        InputError: A checkpoint cannot be read, or lacks a layer that an adapter changes.
        AdapterError: A layer has other shapes in the adapters than in the checkpoints.
    """

    aligned: str | Path
    base: str | Path
    adapters: Sequence[Adapter]
    _checkpoints: list[Checkpoint] = field(default_factory=list, init=False, repr=False, compare=False)
    _compared: dict[str, dict[str, Comparison]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.adapters:
            raise InputError("An aligned pair is compared with adapters, but none was given.")
        self._checkpoints.extend((Checkpoint(self.aligned, "aligned"), Checkpoint(self.base, "base")))
        for adapter in self.adapters:
            for layer, factors in adapter.layers.items():
                expected = factors.shape[::-1] if adapter.config.get("fan_in_fan_out") else factors.shape
                for checkpoint in self._checkpoints:
                    found = checkpoint.shape(layer)
                    if found != expected:
                        raise AdapterError(
                            f"'{layer}.weight' has shape {found} in {checkpoint.source}, but adapter '{adapter.name}' "
                            f"changes a weight of shape {expected}; give the models the adapters were trained on."
                        )

    def difference(self, layer: str) -> Tensor:
        """Return V = W_aligned − W_base.

        Args:
            layer: Module path.

        Returns:
            V, shape (d_out, d_in), float32.

        Raises:
            InputError: The two weights are equal, so that there is no direction of alignment.
        """
        aligned, base = (checkpoint.read(layer) for checkpoint in self._checkpoints)
        transposed = any(a.config.get("fan_in_fan_out") for a in self.adapters if layer in a.layers)
        difference = aligned - base
        if not bool(difference.count_nonzero()):
            raise InputError(
                f"The aligned and the base model have the same weight '{layer}', so they show no direction of alignment "
                "there: give a pair that differs in every layer the adapters change."
            )
        return difference.mT if transposed else difference

    def apply(self, layer: str, columns: Tensor) -> Tensor:
        """Return C X = V (Vᵀ X) / ‖V‖_F.

        Args:
            layer: Module path.
            columns: X, shape (d_out, k).

        Returns:
            C X, shape (d_out, k), float64.
        """
        return _apply(self.difference(layer), columns)

    def comparisons(self, adapter: str) -> Mapping[str, Comparison]:
        """Compare C ΔW with ΔW in every layer that an adapter changes.

        Layers whose weight change is zero are left out. The first call reads every layer of the pair once and compares all
        adapters.

        Args:
            adapter: Name of the adapter.

        Returns:
            Comparisons by module path, in the order of the adapter's layers.

        Raises:
            InputError: The pair was built without this adapter.
        """
        if not self._compared:
            self._compared.update(self._compare_all())
        if adapter not in self._compared:
            raise InputError(
                f"The aligned pair was built for the adapters {list(self._compared)}, but not '{adapter}'."
            )
        return self._compared[adapter]

    def _compare_all(self) -> dict[str, dict[str, Comparison]]:
        compared: dict[str, dict[str, Comparison]] = {adapter.name: {} for adapter in self.adapters}
        layers = list(dict.fromkeys(layer for adapter in self.adapters for layer in adapter.layers))
        for layer in layers:
            difference: Tensor | None = None
            for adapter in self.adapters:
                factors = adapter.layers.get(layer)
                columns = None if factors is None else _orthonormal_rows(factors)
                if columns is None or not bool(columns.count_nonzero()):
                    continue
                difference = self.difference(layer) if difference is None else difference
                compared[adapter.name][layer] = _compare(difference, columns)
        return compared


def _orthonormal_rows(factors: LoraFactors) -> Tensor:
    """Return B' (d_out, r) with ΔW = B' Q and orthonormal rows of Q, so that norms of ΔW are norms of B'; float64."""
    triangle: Tensor = torch.linalg.qr(factors.A.double().mT).R
    return factors.scaling * (factors.B.double() @ triangle.mT)


def _apply(difference: Tensor, columns: Tensor) -> Tensor:
    image = difference @ (difference.mT @ columns.to(difference.dtype))
    return image.double() / float(torch.linalg.vector_norm(difference, dtype=torch.float64))


def _compare(difference: Tensor, columns: Tensor) -> Comparison:
    projected = _apply(difference, columns)
    norms = float(projected.norm() * columns.norm())
    return Comparison(
        # C ΔW = 0 is as far from ΔW as can be.
        cosine=float((projected * columns).sum()) / norms if norms > 0 else 0.0,
        distance=float((projected - columns).norm()) / difference.numel() ** 0.5,
    )


def _locate(path: Path, source: str) -> dict[str, Path]:
    """Return the file of every tensor."""
    if path.is_file():
        return dict.fromkeys(_names(path, source), path)
    if (path / INDEX_FILE).is_file():
        what = f"{INDEX_FILE} of {source}"
        index = read_json(path / INDEX_FILE, what).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
            raise InputError(f"{what} cannot be read as an index of shards: it has no weight_map of names to files.")
        foreign = next((shard for shard in index.values() if shard != Path(shard).name or shard in ("", "..")), None)
        if foreign is not None:
            raise InputError(f"{what} names the shard '{foreign}', which is no file beside it.")
        files = {name: path / shard for name, shard in index.items()}
        held = {shard: _names(shard, source) for shard in set(files.values())}
        for name, shard in files.items():
            if name not in held[shard]:
                raise InputError(f"{INDEX_FILE} of {source} says that {shard.name} holds '{name}', but it does not.")
        return files
    if (path / SINGLE_FILE).is_file():
        return dict.fromkeys(_names(path / SINGLE_FILE, source), path / SINGLE_FILE)
    raise InputError(
        f"Found no safetensors weights of {source}: expected a directory with {SINGLE_FILE} or {INDEX_FILE}, or a "
        ".safetensors file. (Download a hub model first; pickled .bin files are not read, because pickles can run code.)"
    )


def _names(path: Path, source: str) -> frozenset[str]:
    return frozenset(read_tensor_headers(path, f"{path.name} of {source}", may_be_empty=True)[0])
