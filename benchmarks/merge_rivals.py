"""What PEFT, mergekit and a plain line of torch take to merge the same adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from merge_shapes import ModelShape
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from sstmerge.adapters import Adapter

DENSITY = 0.5
FACTOR_TYPES = ("dare_linear", "dare_ties")
DENSE_TYPES = ("svd", "dare_linear_svd", "ties_svd")
MERGED = "merged"


class PeftMerge:
    """PEFT's `add_weighted_adapter` on a model whose adapters share the memory of ours; its base weights are never read."""

    def __init__(self, shape: ModelShape, adapters: Sequence[Adapter], rank: int) -> None:
        self.names = [adapter.name for adapter in adapters]
        self.weights = [1.0 / len(adapters)] * len(adapters)
        targets = [module.split(".")[1] for module in shape.block()]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
        any_factor = next(iter(adapters[0].layers.values())).A
        base = _Model(shape, len({path.split(".")[2] for path in adapters[0].layers}), any_factor)
        with torch.device("meta"):  # PEFT fills what it adds with random numbers; there they cost nothing
            model = get_peft_model(base, config, adapter_name=self.names[0])
            for name in self.names[1:]:
                model.add_adapter(name, config)
        self.model: LoraModel = model.base_model
        self.layers = [(p, m) for p, m in self.model.model.named_modules() if isinstance(m, LoraLayer)]
        for path, layer in self.layers:
            for adapter in adapters:
                factors = adapter.layers[path]
                layer.lora_A[adapter.name].weight = nn.Parameter(factors.A, requires_grad=False)
                layer.lora_B[adapter.name].weight = nn.Parameter(factors.B, requires_grad=False)

    def whole(self, kind: str) -> Callable[[], None]:
        """Return the public call: the new adapter's modules are made, filled with random numbers, and then merged."""

        def call() -> None:
            self.model.add_weighted_adapter(self.names, self.weights, MERGED, kind, density=DENSITY)

        return call

    def formula(self, kind: str) -> Callable[[], object]:
        """Return the merge alone: PEFT's own function of one layer, for every layer."""

        def call() -> object:
            with torch.no_grad():
                return [
                    self.model._generalized_task_arithmetic_weighted_adapter(
                        kind, self.names, self.weights, layer, DENSITY, "total"
                    )
                    for _, layer in self.layers
                ]

        return call

    def clear(self) -> None:
        """Take the merged adapter out again."""
        if MERGED in self.model.peft_config:
            self.model.delete_adapter(MERGED)


class _Model(nn.Module):
    """A Llama's linear layers; all weights are views of one block of zeros, which no page of memory ever backs."""

    def __init__(self, shape: ModelShape, blocks: int, like: torch.Tensor) -> None:
        super().__init__()
        self.config = {"model_type": "random"}
        shared = like.new_zeros(max(rows * columns for rows, columns in shape.block().values()))
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([_block(shape, shared) for _ in range(blocks)])


def _block(shape: ModelShape, shared: torch.Tensor) -> nn.Module:
    block = nn.Module()
    for path, (d_out, d_in) in shape.block().items():
        part, name = path.split(".")
        if not hasattr(block, part):
            block.add_module(part, nn.Module())
        linear = nn.Linear(d_in, d_out, bias=False, device="meta")
        linear.weight = nn.Parameter(shared[: d_in * d_out].view(d_out, d_in), requires_grad=False)
        getattr(block, part).add_module(name, linear)
    return block


def plain_torch(adapters: Sequence[Adapter]) -> Callable[[], object]:
    """Return DARE as its paper writes it, on factors: Σ_t w_t (mask ∘ A_t) / p, and the same for B."""
    weight = 1.0 / len(adapters) / DENSITY

    def merged(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros_like(tensors[0])
        for tensor in tensors:
            total.add_(tensor * torch.empty_like(tensor).bernoulli_(DENSITY), alpha=weight)
        return total

    def call() -> object:
        return {
            path: (merged([a.layers[path].A for a in adapters]), merged([a.layers[path].B for a in adapters]))
            for path in adapters[0].layers
        }

    return call


def mergekit_dare(adapters: Sequence[Adapter], block: int = 0) -> Callable[[], object]:
    """Return mergekit's `dare_linear` on the dense weight changes of one block; mergekit merges no factors."""
    from mergekit.sparsify import SparsificationMethod, sparsify

    paths = [path for path in adapters[0].layers if path.startswith(f"model.layers.{block}.")]
    weight = 1.0 / len(adapters)

    def merged(path: str) -> torch.Tensor:
        deltas = [a.layers[path].scaling * (a.layers[path].B.float() @ a.layers[path].A.float()) for a in adapters]
        sparse = [sparsify(delta, density=DENSITY, method=SparsificationMethod.random) for delta in deltas]
        return (torch.stack(sparse) * weight / DENSITY).sum(dim=0)

    def call() -> object:
        for path in paths:
            merged(path)
        return None

    return call
