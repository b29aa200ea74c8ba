"""Taps that sketch a layer's inputs and output gradients in full dimension while the backward pass runs.

Unlike the taps of `sstmerge.fisher.taps` there are no bases to project on and no adapters to add: the model stays the base
model. A layer's input x is kept until its gradient δ arrives, then both are multiplied by the test matrices and forgotten.
Layers that read one and the same tensor (q, k and v; gate and up) share one sketch of it. Which ones do is found
beforehand (`sstmerge.fisher.sketch_plan`), and checked in every pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sstmerge.errors import FisherError
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.sketch import SketchedLayer
from sstmerge.fisher.sketch_plan import Identity, SketchPlan, identity_of
from sstmerge.fisher.sketch_sums import MomentSums, ScoreSums
from sstmerge.fisher.taps import base_modules


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
        self.read: Identity | None = None
        self._layer, self._plan = layer, plan
        self.clear()

    def clear(self) -> None:
        """Begin new sums; those so far are left to whoever holds them."""
        layer, plan, device = self._layer, self._plan, self.taps.devices[self.name]
        self.input_count = torch.zeros(2, dtype=torch.float64)
        self.output = MomentSums(layer.outputs, plan.signs, plan.dtype, device)
        self.input = None if self.owner is not self else MomentSums(layer.inputs, plan.signs, plan.dtype, device)
        self.score = ScoreSums(layer.outputs, layer.inputs, plan.signs, plan.dtype, device) if plan.scores else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Be the forward hook of the layer: return its output, unchanged, with this tap on its gradient's way."""
        if not torch.is_grad_enabled():
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        self.read = identity_of(x)
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
        """Return the sums by name; the tensors themselves."""
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

    def cleared(self) -> SketchTaps:
        """Begin new sums and return the taps, as what adds up the next batches (`sstmerge.fisher.partial_sums.Sums`)."""
        for tap in self.taps.values():
            tap.clear()
        return self

    @property
    def sums(self) -> dict[str, Tensor]:
        """All sums by name; the tensors themselves, so that those of a checkpoint can be copied into them."""
        return {name: tensor for tap in self.taps.values() for name, tensor in tap.tensors().items()}

    def statistics(self) -> dict[str, Tensor]:
        """Return all sums, on the CPU."""
        return {name: tensor.cpu() for name, tensor in self.sums.items()}


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


def _device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
