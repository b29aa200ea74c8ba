"""How much memory a run will need, found from headers and configurations alone.

The estimate counts what is certain to be held at once: weights of the model, adapters and bases, statistics, and what
solving them takes. Activations and temporary copies come on top: a run that is refused would not have fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from sstmerge.adapters.configuration import CONFIG_FILE
from sstmerge.adapters.files import WEIGHTS_FILE
from sstmerge.errors import AdapterError, InputError
from sstmerge.fisher.structures import Structure, parse_structure
from sstmerge.ops import default_device
from sstmerge.pipeline.models import parameter_count
from sstmerge.untrusted import FLOATING_POINT, read_tensor_headers

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_QUANTIZED = {"8bit": 1.0, "4bit": 0.5}


@dataclass(frozen=True)
class Layer:
    """What the headers of the adapters say of one layer.

    Attributes:
        outputs: d_out.
        inputs: d_in.
        rank: Sum of the adapters' ranks Σr.
    """

    outputs: int
    inputs: int
    rank: int

    @property
    def core(self) -> tuple[int, int]:
        """Largest possible shape (R_o, R_i) of the core."""
        return min(self.outputs, self.rank), min(self.inputs, self.rank)


@dataclass
class Estimate:
    """Bytes of everything that is held at once, by what it is.

    Attributes:
        parts: Bytes in the machine's memory by name.
    """

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self.parts.values())

    def refuse_if_too_large(self, available: float | None, *, ignore: bool = False) -> None:
        """Refuse a run that cannot fit.

        Args:
            available: Bytes there are; None where that is not known.
            ignore: Go on anyway.

        Raises:
            InputError: If more is needed than there is.
        """
        if ignore or available is None or self.total <= available:
            return
        parts = ", ".join(f"{name} {_size(size)}" for name, size in sorted(self.parts.items(), key=lambda p: -p[1]))
        raise InputError(
            f"This run needs about {_size(self.total)} of memory ({parts}), but {_size(available)} are free. Load the "
            "model in a smaller --dtype or with --quantization, or collect less (--structure kfac, --limit, "
            "--module-share); or go on anyway with --ignore-memory."
        )


def read_layers(directories: Sequence[str | Path]) -> dict[str, Layer]:
    """Read the layers of adapters from the headers of their files.

    Args:
        directories: Adapter directories; what is no directory (a hub id) is left out.

    Returns:
        The layers by module path.
    """
    layers: dict[str, Layer] = {}
    for directory in directories:
        path = Path(directory).expanduser() / WEIGHTS_FILE
        if not (path.is_file() and (path.parent / CONFIG_FILE).is_file()):
            continue
        headers, _ = read_tensor_headers(path, str(path), AdapterError, dtypes=FLOATING_POINT)
        for name, header in headers.items():
            partner = headers.get(name.replace(".lora_A.", ".lora_B."))
            if ".lora_A." not in name or partner is None or len(header.shape) != 2 or len(partner.shape) != 2:
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            known = layers.get(module)
            rank = header.shape[0] + (known.rank if known else 0)
            layers[module] = Layer(partner.shape[0], header.shape[1], rank)
    return layers


def space_bytes(layers: Mapping[str, Layer]) -> dict[str, float]:
    """Return the sizes of the adapters and of their bases: factors in float64 while bases are built, bases in float32."""
    factors = sum(8.0 * (layer.outputs + layer.inputs) * layer.rank for layer in layers.values())
    bases = sum(4.0 * (layer.outputs * layer.core[0] + layer.inputs * layer.core[1]) for layer in layers.values())
    return {"adapters": factors, "bases": bases}


def statistics_bytes(structure: Structure, layers: Mapping[str, Layer], rows: int) -> float:
    """Return the size of the statistics of Fishers in the whole space.

    Args:
        structure: Their structure.
        layers: The layers.
        rows: Sequences times draws times reference points, of all Fishers together.

    Returns:
        Bytes; for the structures that sum, of one Fisher with two split halves.
    """
    cores = [layer.core for layer in layers.values()]
    if structure is Structure.GLOBAL:
        return 4.0 * rows * sum(map(prod, cores))
    per_layer: dict[Structure, Callable[[int, int], float]] = {
        Structure.DIAGONAL: lambda o, i: 16.0 * o * i,
        Structure.KFAC: lambda o, i: 8.0 * (o * o + i * i + o * i),
        Structure.EKFAC: lambda o, i: 8.0 * (2 * (o * o + i * i) + 2 * o * i),
        Structure.BLOCK: lambda o, i: 4.0 * (o * i) ** 2 + 8.0 * o * i,
    }
    # A structure that is not listed is counted as the smallest one: the estimate errs on the low side.
    size = per_layer.get(structure, per_layer[Structure.DIAGONAL])
    return 2.0 * sum(size(o, i) for o, i in cores)


def solving_bytes(structure: Structure, layers: Mapping[str, Layer]) -> float:
    """Return what solving a pair takes beside the statistics: vectors and duals of every layer in float64."""
    cores = [layer.core for layer in layers.values()]
    if structure not in (Structure.BLOCK, Structure.KFAC, Structure.EKFAC):
        return 0.0
    if structure is Structure.BLOCK:
        return sum(4 * 8.0 * (o * i) ** 2 for o, i in cores)
    return sum(4 * 8.0 * (o * o + i * i) for o, i in cores)


def estimate_collection(
    base: str,
    adapters: Sequence[str],
    structure: str,
    *,
    rows: int,
    fishers: int = 2,
    dtype: str = "auto",
    device: str | None = None,
    quantization: str | None = None,
) -> Estimate:
    """Estimate a run that collects Fishers of a model, and solves them if there are two.

    Args:
        base: Base model: directory or hub id.
        adapters: Adapter directories.
        structure: Structure of the Fishers.
        rows: Sequences times draws times reference points, of all Fishers together.
        fishers: Number of Fishers.
        dtype: As in `load_model`.
        device: As in `load_model`; the weights are counted where they lie on the CPU.
        quantization: As in `load_model`.

    Returns:
        The estimate.
    """
    kind, layers = parse_structure(structure), read_layers(adapters)
    estimate = estimate_model(base, adapters, dtype=dtype, device=device, quantization=quantization)
    estimate.parts["Fishers"] = statistics_bytes(kind, layers, rows) * (1 if kind is Structure.GLOBAL else fishers)
    if fishers > 1:
        estimate.parts["solving"] = solving_bytes(kind, layers)
    return estimate


def estimate_model(
    base: str,
    adapters: Sequence[str],
    *,
    dtype: str = "auto",
    device: str | None = None,
    quantization: str | None = None,
) -> Estimate:
    """Estimate a run that loads a model and adapters, and collects what its options do not tell in advance, or nothing.

    Args:
        base: Base model: directory or hub id.
        adapters: Adapter directories.
        dtype: As in `load_model`.
        device: As in `load_model`; the weights are counted where they lie on the CPU.
        quantization: As in `load_model`.

    Returns:
        The estimate.
    """
    parts = space_bytes(read_layers(adapters))
    if (device or str(default_device())).startswith("cpu"):
        parts["base model"] = model_bytes(base, dtype=dtype, quantization=quantization)
    return Estimate(parts)


def estimate_solving(fishers: Sequence[str | Path], adapters: Sequence[str]) -> Estimate:
    """Estimate a merge from Fisher files: the files as they are, adapters and bases.

    Args:
        fishers: Fisher files.
        adapters: Adapter directories.

    Returns:
        The estimate.
    """
    sizes = [Path(file).stat().st_size for file in fishers if Path(file).is_file()]
    return Estimate({**space_bytes(read_layers(adapters)), "Fishers": float(sum(sizes))})


def model_bytes(base: str, *, dtype: str = "auto", quantization: str | None = None) -> float:
    """Return the size of a model's weights when loaded.

    Args:
        base: Directory or hub id.
        dtype: As in `load_model`.
        quantization: As in `load_model`.

    Returns:
        Bytes: for a directory from its safetensors headers, else from the number of parameters, as 16-bit numbers.
    """
    per_parameter = _QUANTIZED.get(quantization or "") or _BYTES.get(dtype)
    files = sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
    if not files:
        return parameter_count(base) * (per_parameter or 2.0)
    tensors = [t for file in files for t in read_tensor_headers(file, str(file), may_be_empty=True)[0].values()]
    return sum(t.bytes if per_parameter is None else prod(t.shape) * per_parameter for t in tensors)


def points_of(reference: str) -> int:
    """Return the number of points of a reference expression, 1 where it is no path (or none that can be read)."""
    parts = reference.split(":")
    return int(parts[-1]) if parts[0] == "path" and parts[-1].isdigit() and len(parts[-1]) < 6 else 1


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
