"""LoRA layers of a live PEFT model, whatever they adapt, as pairs of matrices: ΔW = scaling · B A.

Linear layers (with `fan_in_fan_out` and quantised ones), embeddings and convolutions all fit: a convolution's lora_A is a
matrix once its kernel is flattened into the input, an embedding's factors are parameters instead of modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from sstmerge.adapters import LoraFactors


@dataclass(frozen=True)
class Layer:
    """One LoRA layer.

    Attributes:
        path: Its path in the base model.
        module: PEFT's layer.
        inside_another: Whether it lies inside another LoRA layer (the output projection of `nn.MultiheadAttention`).
    """

    path: str
    module: LoraLayer
    inside_another: bool

    def has(self, adapter: str) -> bool:
        """Whether an adapter has factors here."""
        return adapter in self.module.lora_A or adapter in self.module.lora_embedding_A

    def parameters(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return lora_A and lora_B as they are."""
        if adapter in self.module.lora_A:
            return self.module.lora_A[adapter].weight, self.module.lora_B[adapter].weight
        return self.module.lora_embedding_A[adapter], self.module.lora_embedding_B[adapter]

    def factors(self, adapter: str) -> LoraFactors:
        """Return views of the factors as matrices, A (r, d_in) and B (d_out, r), detached."""
        A, B = self.parameters(adapter)
        scaling = float(self.module.scaling[adapter])
        return LoraFactors(A=A.detach().flatten(1), B=B.detach().flatten(1), scaling=scaling)

    def bias(self, adapter: str) -> nn.Parameter | None:
        """Return the bias of lora_B; None where the adapter has none."""
        return getattr(self.module.lora_B[adapter], "bias", None) if adapter in self.module.lora_B else None

    def members(self, adapters: Sequence[str]) -> list[int]:
        """Return which of the adapters have factors here, by position."""
        return [index for index, adapter in enumerate(adapters) if self.has(adapter)]

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 elsewhere."""
        return int(getattr(self.module.get_base_layer(), "groups", 1))

    def delta(self, adapter: str, *, out: Tensor | None = None) -> Tensor:
        """Return the dense ΔW in the shape and dtype that PEFT gives it: random numbers are drawn in the order of its rows.

        Layers that have no such function (some quantised ones) are linear, and their ΔW is a plain product.

        Args:
            adapter: The adapter.
            out: Memory from `memory_for_delta`, used if it fits.

        Returns:
            ΔW, for the caller to change.
        """
        factors = self.factors(adapter)
        if self._is_plain(adapter):
            fits = out is not None and (out.dtype, out.device) == (factors.B.dtype, factors.B.device)
            product = torch.mm(factors.B, factors.A, out=out if fits else None)
            return product if factors.scaling == 1 else product.mul_(factors.scaling)
        if hasattr(self.module, "get_delta_weight"):
            delta: Tensor = self.module.get_delta_weight(adapter)
            return delta.detach()
        return (factors.B.float() @ factors.A.float() * factors.scaling).to(factors.B.dtype)

    def memory_for_delta(self, adapter: str) -> Tensor | None:
        """Return memory for dense ΔW of the dtype of an adapter; None where PEFT makes them in its own way."""
        factors = self.factors(adapter)
        return factors.B.new_empty(factors.shape) if self._is_plain(adapter) else None

    def _is_plain(self, adapter: str) -> bool:
        """Whether PEFT's ΔW is scaling · B A, computed in the dtype of the factors."""
        dtypes = {parameter.dtype for parameter in self.parameters(adapter)}
        is_linear = type(self.module) is Linear and not self.module.fan_in_fan_out
        return is_linear and dtypes in ({torch.float32}, {torch.float64})

    def as_matrix(self, delta: Tensor) -> Tensor:
        """Turn a dense ΔW of PEFT's shape into B A, shape (d_out, d_in)."""
        is_transposed = bool(getattr(self.module, "fan_in_fan_out", False)) or len(self.module.lora_embedding_A) > 0
        return delta.mT if is_transposed else delta.flatten(1)

    def write(self, adapter: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        """Set the factors of an adapter that PEFT has just made, padded with zeros to its rank.

        Args:
            adapter: The adapter.
            A: Shape (k, d_in) with k up to the adapter's rank; its dtype becomes the adapter's.
            B: Shape (d_out, k), the same dtype.
            bias: Bias of lora_B, shape (d_out,); None leaves what is there.
        """
        new_A, new_B = self.parameters(adapter)
        rank, padded_A, padded_B = len(new_A), A, B
        if A.shape[0] < rank:
            padded_A, padded_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(B.shape[0], rank)
            padded_A[: A.shape[0]], padded_B[:, : B.shape[1]] = A, B
        # Copies: a slice would keep the whole of what it was cut from.
        new_A.data = padded_A.reshape(new_A.shape).to(new_A.device).clone(memory_format=torch.contiguous_format)
        new_B.data = padded_B.reshape(new_B.shape).to(new_B.device).clone(memory_format=torch.contiguous_format)
        own = self.bias(adapter)
        if own is not None:
            own.data = (own.new_zeros(own.shape) if bias is None else bias).to(device=own.device, dtype=B.dtype)


@dataclass(frozen=True)
class Parts:
    """What matters of a model.

    Attributes:
        layers: Its LoRA layers in the order in which PEFT visits them.
        auxiliary: Modules that hold more than LoRA factors for an adapter (full copies, token embeddings), by path.
        paths: Paths of all modules that PEFT may put an adapter on.
    """

    layers: tuple[Layer, ...]
    auxiliary: dict[str, AuxiliaryTrainingWrapper]
    paths: tuple[str, ...]


def parts_of(model: LoraModel) -> Parts:
    """Walk a model once, without looking into the factors of its adapters.

    Args:
        model: The tuner.

    Returns:
        Its parts.
    """
    layers: list[Layer] = []
    auxiliary: dict[str, AuxiliaryTrainingWrapper] = {}
    paths: list[str] = []
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module, bool]] = [("", model.model, False)]
    while waiting:
        path, module, inside = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if path and not inside:
            paths.append(path)
        if isinstance(module, AuxiliaryTrainingWrapper):
            auxiliary[path] = module
        is_layer = isinstance(module, LoraLayer)
        if is_layer:
            layers.append(Layer(path, module, inside))
        # Depth first and in order; of a LoRA layer, only what it was put around.
        children = [(name, child) for name, child in module.named_children() if not is_layer or name == "base_layer"]
        for name, child in reversed(children):
            waiting.append((f"{path}.{name}" if path else name, child, inside or is_layer))
    return Parts(tuple(layers), auxiliary, tuple(paths))
