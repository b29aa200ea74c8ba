"""Taps that sketch a layer's inputs and output gradients in full dimension while the backward pass runs.

Unlike the taps of `sstmerge.fisher.taps` there are no bases to project on and no adapters to add: the model stays the base
model. A layer's input x is kept until its gradient δ arrives, then both are multiplied by the test matrices and forgotten.
Layers that read one and the same tensor (q, k and v; gate and up) share one sketch of it. Which ones do is found by a
pass of one sequence, and checked in every pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sstmerge.errors import FisherError, InputError
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.head import Head
from sstmerge.fisher.placement import input_device
from sstmerge.fisher.sketch import SketchedLayer
from sstmerge.fisher.sketch_sums import MomentSums, RandomSigns, ScoreSums, score_rank
from sstmerge.fisher.taps import base_modules, frozen

# What tells tensors apart that are alive at the same time.
_Identity = tuple[int, torch.Size, tuple[int, ...], int]


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
        """Memory of all sums, and size of the file up to a few per cent."""
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
        owners: dict[tuple[_Identity, ...], str] = {}
        for name, calls in self.calls.items():
            if not calls:
                left_out[name] = "no token passes through it"
            elif any(x.numel() != batch.input_ids.numel() * x.shape[-1] for x, _ in calls):
                left_out[name] = "it does not see one row per token (a routed expert, for instance)"
            else:
                owner = owners.setdefault(tuple(_identity(x) for x, _ in calls), name)
                x, outputs = calls[0]
                layers[name] = SketchedLayer(outputs, x.shape[-1], owner)
        return layers, left_out


class BatchRows:
    """Which rows of a layer's activations belong to which split half, and what they weigh; set anew for every batch.

    Attributes:
        scale: Factor that the gradients carry.
        draws: Draws of the labels.
        first_draw: Whether inputs are to be added; they are the same for every draw and counted `draws` times at once.
        count: Σ w over positions, times the draws, per half, shape (2,), float64.
    """

    def __init__(self, batch: Batch, scale: float, draws: int) -> None:
        self.shape = tuple(batch.input_ids.shape)
        self.scale = scale
        self.draws = draws
        self.first_draw = True
        weight = batch.weight[:, None].expand(self.shape)
        self._rows = []
        for half in (0, 1):
            chosen = batch.attention_mask.bool() & (batch.index % 2 == half)[:, None]
            index = chosen.flatten().nonzero()[:, 0]
            self._rows.append((index, weight.flatten()[index].sqrt()[:, None]))
        self.count = torch.stack([draws * root.double().square().sum().cpu() for _, root in self._rows])

    def of_half(self, values: Tensor, half: int, name: str) -> tuple[Tensor, Tensor]:
        """Return the real rows of a half in float32 or better, shape (n, d), and the root of their weights, (n, 1)."""
        size, length = self.shape
        if values.numel() != size * length * values.shape[-1]:
            raise FisherError(
                f"Layer '{name}' saw an input of shape {tuple(values.shape)} for a batch of {size} sequences of {length} "
                "tokens; expected one row per token. Name the layers to sketch, and leave this one out."
            )
        index, root_weight = self._rows[half]
        rows = values.reshape(-1, values.shape[-1])[index.to(values.device)]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return rows, root_weight.to(rows)


class SketchTap:
    """The hook of one layer, with its sums.

    Attributes:
        name: Module path.
        owner: The tap that sketches the input, which may be this one.
        calls: Backward passes since the last `SketchTaps.begin`.
        input: Sketch of the input; None where another tap has it.
        output: Sketch of the output's gradient.
        score: Sketch of the mean score; None where it is not wanted.
        input_count: Σ w over positions, shape (2,), float64.
    """

    def __init__(self, name: str, owner: SketchTap | None, layer: SketchedLayer, plan: SketchPlan, taps: SketchTaps):
        self.name = name
        self.owner = owner or self
        self.taps = taps
        self.calls = 0
        self.read: _Identity | None = None
        self.input_count = torch.zeros(2, dtype=torch.float64)
        device = taps.devices[name]
        self.output = MomentSums(layer.outputs, plan.signs, plan.dtype, device)
        self.input = None if owner else MomentSums(layer.inputs, plan.signs, plan.dtype, device)
        self.score = ScoreSums(layer.outputs, layer.inputs, plan.signs, plan.dtype, device) if plan.scores else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Be the forward hook of the layer: return its output, unchanged, with this tap on its gradient's way."""
        if not torch.is_grad_enabled():
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        self.read = _identity(x)
        if self.read != self.owner.read:
            raise FisherError(
                f"Layer '{self.name}' read the same input as '{self.owner.name}' for the first sequence, but another one "
                "for a later batch, so they cannot share a sketch; name one of them in a sketch of its own."
            )
        return _SketchFunction.apply(x, output, self.taps.anchor.to(output.device), self)  # type: ignore[no-any-return]

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Add one call's inputs (…, d_in) and output gradients (…, d_out)."""
        self.calls += 1
        rows = self.taps.rows
        if rows.first_draw:
            self.input_count += rows.count
        for half in (0, 1):
            delta, root_weight = rows.of_half(gradient, half, self.name)
            if not len(delta):
                continue
            delta = delta / rows.scale if rows.scale != 1.0 else delta
            tested = self.output.add(half, delta)
            if self.score is None and (self.input is None or not rows.first_draw):
                continue
            weighted = rows.of_half(x, half, self.name)[0] * root_weight
            if self.input is not None and rows.first_draw:
                self.input.add(half, weighted, copies=rows.draws)
            if self.score is not None:
                self.score.add(delta, tested, weighted)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name; the tensors themselves, so that a checkpoint can be copied into them."""
        named = {"output_product": self.output.product, "output_diagonal": self.output.diagonal}
        named["input_count"] = self.input_count
        if self.input is not None:
            named |= {"input_product": self.input.product, "input_diagonal": self.input.diagonal}
        if self.score is not None:
            named |= {"score_left": self.score.left, "score_right": self.score.right}
        return {f"{kind}.{self.name}": tensor for kind, tensor in named.items()}


class _SketchFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, anchor: Tensor, tap: SketchTap) -> Tensor:
        ctx.tap = tap
        ctx.save_for_backward(x)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, None, None]:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        ctx.tap.add(x, gradient)
        return None, gradient if ctx.needs_input_grad[1] else None, None, None


class SketchTaps:
    """The installed taps of a model.

    Attributes:
        taps: Taps by module path.
        devices: Where each layer's sums are kept.
        anchor: Makes outputs require a gradient even where no parameter does.
    """

    def __init__(self, plan: SketchPlan, modules: dict[str, nn.Module]) -> None:
        self.devices = {name: _device_of(modules[name]) for name in plan.layers}
        self.anchor = torch.zeros((), requires_grad=True)
        self.taps: dict[str, SketchTap] = {}
        for name, layer in plan.layers.items():
            owner = None if layer.input_of == name else self.taps[layer.input_of]
            self.taps[name] = SketchTap(name, owner, layer, plan, self)
        self._rows: BatchRows | None = None

    @property
    def rows(self) -> BatchRows:
        """The rows of the current batch."""
        if self._rows is None:
            raise FisherError("A sketch's taps saw a backward pass outside a batch; collect with collect_sketch.")
        return self._rows

    def begin(self, rows: BatchRows, draw: int) -> None:
        """Prepare for the backward pass of one draw of the labels."""
        rows.first_draw = draw == 0
        self._rows = rows
        for tap in self.taps.values():
            tap.calls = 0

    def check_all_called(self) -> None:
        """Refuse layers that the backward pass did not reach.

        Raises:
            FisherError: If there is one.
        """
        for tap in self.taps.values():
            if not tap.calls:
                raise FisherError(
                    f"Layer '{tap.name}' received no gradient from the loss, so it has no scores. Either the model does "
                    "not use it for these inputs, or it detaches it (reentrant gradient checkpointing does): switch that "
                    "off, or name the layers to sketch without it."
                )

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums by name."""
        return {name: tensor for tap in self.taps.values() for name, tensor in tap.tensors().items()}


@contextmanager
def installed_sketch_taps(model: nn.Module, plan: SketchPlan) -> Iterator[SketchTaps]:
    """Sketch what passes through a model's layers while the block runs.

    Args:
        model: The model the plan was made for; its parameters must not require gradients.
        plan: The plan.

    Yields:
        The taps.
    """
    with ExitStack() as stack:
        modules = base_modules(model, stack)
        targets = {name: getattr(modules[name], "base_layer", modules[name]) for name in plan.layers}
        taps = SketchTaps(plan, targets)
        for name, module in targets.items():
            stack.callback(module.register_forward_hook(taps.taps[name], with_kwargs=True).remove)
        yield taps


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


def _device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _identity(x: Tensor) -> _Identity:
    return x.data_ptr(), x.shape, tuple(x.stride()), x._version
