"""What to sketch in a model: its linear layers, and which of them read one and the same input."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sstmerge.errors import InputError
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.head import Head
from sstmerge.fisher.placement import input_device
from sstmerge.fisher.sketch import SketchedLayer
from sstmerge.fisher.sketch_sums import RandomSigns, score_rank
from sstmerge.fisher.taps import base_modules, frozen

# What tells tensors apart that are alive at the same time.
Identity = tuple[int, torch.Size, tuple[int, ...], int]


@dataclass(frozen=True)
class SketchPlan:
    """What will be sketched, found before the data pass.

    Attributes:
        layers: The layers, by module path.
        left_out: Linear modules that are not sketched, with the reason; empty where targets were named.
        signs: The test matrices.
        scores: Whether mean scores are sketched too (labels from the data).
        dtype: Dtype of the sums.
    """

    layers: dict[str, SketchedLayer]
    left_out: dict[str, str]
    signs: RandomSigns
    scores: bool
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Memory of one set of sums (a process holds up to `MOST_LARGE_SUMS`); size of the file to a few per cent."""
        width, total = torch.finfo(self.dtype).bits // 8, 0
        for name, layer in self.layers.items():
            sides = [layer.outputs, layer.inputs] if layer.input_of == name else [layer.outputs]
            total += sum(2 * size * (width * self.signs.columns(size) + 8) for size in sides)
            if self.scores:
                left = layer.outputs * self.signs.columns(layer.inputs, score_rank(self.signs.rank))
                total += width * (left + layer.inputs * self.signs.columns(layer.outputs))
        return total


def plan_sketch(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    rank: int = 256,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    scores: bool = False,
) -> SketchPlan:
    """Find the layers to sketch, and which of them read the same input, by a forward pass of one sequence.

    Args:
        model: The base model.
        batches: The data.
        rank: Columns of the test matrices.
        seed: Their seed.
        targets: Last names of modules (`q_proj`), as in PEFT's `target_modules`; by default all linear modules through which
            every token passes, but for the output head.
        scores: Whether mean scores are to be sketched too.

    Returns:
        The plan.

    Raises:
        InputError: If an option is unusable, or a target is not in the model or is no layer that can be sketched.
    """
    if rank < 1:
        raise InputError(f"The rank of a sketch must be at least 1, but is {rank}.")
    if not batches:
        raise InputError("There are no data to collect a sketch from; give at least one sequence.")
    first = batches[0].select(torch.arange(len(batches[0].index)) == 0)
    with ExitStack() as stack:
        head = Head(model)
        candidates = _candidates(base_modules(model, stack), head.module, targets)
        probe = _Probe(stack, candidates)
        stack.enter_context(frozen(model))
        stack.enter_context(head.capturing([]))
        stack.enter_context(torch.no_grad())
        batch = first.to(input_device(model))
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    layers, left_out = probe.layers(batch)
    if targets is not None and left_out:
        name, reason = next(iter(left_out.items()))
        raise InputError(f"The target '{name}' cannot be sketched: {reason}. Leave it out of the targets.")
    if not layers:
        raise InputError(
            "The model has no linear layer through which every token passes, so there is nothing to sketch."
        )
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    return SketchPlan(layers, left_out, RandomSigns(rank, seed), scores, dtype)


class _Probe:
    """Hooks that note what candidates read and write; the tensors are kept, so that their addresses tell them apart."""

    def __init__(self, stack: ExitStack, candidates: dict[str, nn.Module]) -> None:
        self.calls: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in candidates}
        for name, module in candidates.items():
            stack.callback(module.register_forward_hook(self._noting(name), with_kwargs=True).remove)

    def _noting(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self.calls[name].append((x, output.shape[-1]))

        return note

    def layers(self, batch: Batch) -> tuple[dict[str, SketchedLayer], dict[str, str]]:
        """Return the layers that one token after the other passes through, and why others are left out."""
        layers, left_out = {}, {}
        owners: dict[tuple[Identity, ...], str] = {}
        for name, calls in self.calls.items():
            if not calls:
                left_out[name] = "no token passes through it"
            elif any(x.numel() != batch.input_ids.numel() * x.shape[-1] for x, _ in calls):
                left_out[name] = "it does not see one row per token (a routed expert, for instance)"
            else:
                owner = owners.setdefault(tuple(identity_of(x) for x, _ in calls), name)
                x, outputs = calls[0]
                layers[name] = SketchedLayer(outputs, x.shape[-1], owner)
        return layers, left_out


def identity_of(x: Tensor) -> Identity:
    """Return what tells a tensor from all others that are alive."""
    return x.data_ptr(), x.shape, tuple(x.stride()), x._version


def _candidates(modules: dict[str, nn.Module], head: nn.Module, targets: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the linear modules that are wanted, in the order of the model."""
    linear: dict[str, nn.Module] = {}
    for name, module in modules.items():
        own = getattr(module, "base_layer", module)
        inside_adapter = ".lora_" in name or ".base_layer" in name
        if not inside_adapter and own is not head and _is_linear(own):
            linear[name] = own
    if targets is None:
        return linear
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        found = {name: m for name, m in linear.items() if name == target or name.endswith(f".{target}")}
        if not found:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise InputError(
                f"The target '{target}' is no linear layer of the model; its layers are of the kinds {kinds} (the output "
                "head is never sketched)."
            )
        chosen |= found
    return {name: linear[name] for name in linear if name in chosen}


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's Conv1D is a linear layer with a transposed weight; quantised layers have sizes but no float weight.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or _has_sizes(module)


def _has_sizes(module: nn.Module) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)
