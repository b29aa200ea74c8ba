"""How much memory a run will need, found from headers and configurations alone.

The estimate counts what is certain to be held at once: weights of the model, adapters and bases, statistics, what solving
them takes, and the activations of one batch. It errs on the low side: a run that is refused would not have fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from sstmerge.adapters.configuration import CONFIG_FILE
from sstmerge.adapters.files import WEIGHTS_FILE
from sstmerge.errors import AdapterError, InputError
from sstmerge.fisher.structures import Structure
from sstmerge.untrusted import FLOATING_POINT, read_tensor_headers


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
        parts: Bytes on the CPU (and on the model's device, where that is the CPU) by name.
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
            f"This run needs about {_size(self.total)} of memory ({parts}), but {_size(available)} are free. Choose a "
            "smaller --structure (kfac), fewer rows (--limit), fewer --tokens-per-batch or --module-share; or go on anyway "
            "with --ignore-memory."
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
    if structure is Structure.BLOCK:
        return sum(4 * 8.0 * (o * i) ** 2 for o, i in cores)
    return sum(4 * 8.0 * (o * o + i * i) for o, i in cores)


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
