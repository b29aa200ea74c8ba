"""Taps: what makes a base model behave as any point of the core space, and reads its scores there.

A tap sits on the base layer's own linear module, not on lora_A or lora_B. With bases U (d_out, R_o) and V (d_in, R_i) and
the reference's core C it adds

    forward    y += (x V) Cᵀ Uᵀ           the reference adapters, never folded into (and rounded with) the weights
    backward   δ̃ = δ U,  ∂x += δ̃ C Vᵀ     δ = the gradient at the layer's output

so the projections x̃ = x V and δ̃ = δ U that the statistics need are the very products that the adapters cost anyway.
No weight is changed, no weight gradient is formed, and the backward pass ends at the lowest tapped layer, because only
the taps require gradients. Scores are recorded in the backward pass, which autograd runs once per call of a module:
checkpointed forward passes, wrappers, quantised base layers and modules called several times are all counted right.

Layers that are given the very same input (q, k and v; gate and up) project it in one product. Which do is seen, not guessed
from names: one forward pass of a single token, before the first batch, shows whose inputs are one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sstmerge.adapters import CoreSpace
from sstmerge.errors import AdapterError, InputError
from sstmerge.fisher.placement import differentiable, eager, uncompiled
from sstmerge.ops import BackendName, project_accumulate


class Tap:
    """The hook of one layer.

    Attributes:
        name: Module path.
        records: Pairs (x̃ (..., R_i), δ̃ (..., R_o)) of the backward passes since the last `clear`.
    """

    def __init__(
        self, name: str, U: Tensor, V: Tensor, core: Tensor | None, anchor: Tensor | None, backend: BackendName
    ) -> None:
        self.name = name
        self.backend: BackendName = backend
        self.records: list[tuple[Tensor, Tensor]] = []
        self.anchor = anchor
        self.shared: SharedInput | None = None
        self.watcher: Callable[[Tap, Tensor], None] | None = None
        self._bases = (U, V, core)
        self._placed: tuple[torch.device, torch.dtype] | None = None
        self.U = U  # (d_out, R_o), replaced at the first call by a copy in the activations' dtype
        self.V = V  # (d_in, R_i)
        self.forward_map: Tensor | None = None  # Cᵀ Uᵀ (R_i, d_out)
        self.backward_map: Tensor | None = None  # C Vᵀ (R_o, d_in)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Be the forward hook of the layer: return its output with the reference adapters added."""
        x = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(output, Tensor):
            raise AdapterError(
                f"Layer '{self.name}' of the model is a {type(module).__name__}, which returns no single tensor (a router "
                "of experts, for instance); sstmerge merges linear layers only: leave it out of the adapters."
            )
        if x.shape[-1] != self.V.shape[0] or output.shape[-1] != self.U.shape[0]:
            raise AdapterError(
                f"Layer '{self.name}' maps {x.shape[-1]} to {output.shape[-1]} features in the model, but "
                f"{self.V.shape[0]} to {self.U.shape[0]} in the adapters: they were trained on another base model."
            )
        self._place(x, output)
        if self.watcher is not None:
            self.watcher(self, x)
        if self.anchor is not None and torch.is_grad_enabled():
            # The anchor makes the output require a gradient even where the input does not (the lowest layers).
            return _TapFunction.apply(x, output, self.anchor.to(output.device), self)  # type: ignore[no-any-return]
        if self.forward_map is None:
            return output
        return output + self.project(x, self.V).to(output.dtype) @ self.forward_map

    def project_input(self, x: Tensor) -> Tensor:
        """Return x̃ = x V, from one product with those of the other layers that were given the same tensor."""
        return self.project(x, self.V) if self.shared is None else self.shared.project(x, self)

    @property
    def source_basis(self) -> Tensor:
        """V (d_in, R_i) as it was given."""
        return self._bases[1]

    def project(self, rows: Tensor, basis: Tensor) -> Tensor:
        """Return rows (..., d) times a basis (d, R): in float32 from the kernels, in the rows' dtype from torch."""
        by_torch = self.backend == "auto" and (not rows.is_cuda or rows.dtype == torch.float64)
        if by_torch or self.backend == "reference":
            product: Tensor = rows @ basis
            return product
        flat = project_accumulate(rows.reshape(-1, rows.shape[-1]), basis, backend=self.backend)
        return flat.view(*rows.shape[:-1], basis.shape[1])

    def _place(self, x: Tensor, output: Tensor) -> None:
        """Bring the bases to the activations' device and dtype, once."""
        if self._placed == (x.device, x.dtype):
            return
        U, V, core = self._bases
        self.U = U.to(output.device, output.dtype)
        self.V = V.to(x.device, x.dtype)
        if core is not None:
            self.forward_map = (core.double().mT @ U.double().mT).to(output.device, output.dtype)
            self.backward_map = (core.double() @ V.double().mT).to(x.device, x.dtype)
        self._placed = (x.device, x.dtype)


class SharedInput:
    """Layers that read one input: its projections on all their bases are one product, made at the first of them.

    A layer that turns out to get another tensor than the first one projects it alone, so a wrong guess costs time only.

    Attributes:
        taps: The layers' taps in the order of their calls.
    """

    def __init__(self, taps: list[Tap]) -> None:
        self.taps = taps
        self._input: Tensor | None = None
        self._waiting: dict[Tap, Tensor] = {}
        self._basis: Tensor | None = None

    def project(self, x: Tensor, tap: Tap) -> Tensor:
        """Return x̃ (..., R_i) of one layer for its input x (..., d_in)."""
        if tap is self.taps[0]:
            self._project_all(x)
        projected = self._waiting.pop(tap, None) if x is self._input else None
        if not self._waiting:
            self._input = None
        return tap.project(x, tap.V) if projected is None else projected

    def _project_all(self, x: Tensor) -> None:
        basis = self._basis
        if basis is None or (basis.device, basis.dtype) != (x.device, x.dtype):
            self._basis = basis = torch.cat([tap.source_basis.to(x.device, x.dtype) for tap in self.taps], dim=1)
        pieces = self.taps[0].project(x, basis).split([tap.V.shape[1] for tap in self.taps], dim=-1)
        self._input, self._waiting = x, dict(zip(self.taps, pieces, strict=True))


class _TapFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, anchor: Tensor, tap: Tap) -> Tensor:
        projected = tap.project_input(x)
        ctx.tap = tap
        ctx.save_for_backward(projected)
        if tap.forward_map is None:
            return output.view_as(output)
        return output + projected.to(output.dtype) @ tap.forward_map

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        tap: Tap = ctx.tap
        (projected,) = ctx.saved_tensors
        delta = tap.project(gradient, tap.U)
        tap.records.append((projected, delta))
        through = None
        if ctx.needs_input_grad[0] and tap.backward_map is not None:
            through = delta.to(tap.backward_map.dtype) @ tap.backward_map
        return through, gradient if ctx.needs_input_grad[1] else None, None, None


class Taps:
    """The installed taps of a model, grouped like the space they were made for.

    Attributes:
        groups: One list of taps per group of the space.
    """

    def __init__(self, groups: list[list[Tap]]) -> None:
        self.groups = groups
        self._searched = False

    def find_shared_inputs(self, run: Callable[[], object]) -> None:
        """Find the layers that read one input, in a forward pass; once.

        Args:
            run: Runs the model's forward pass without gradients, on any input; one token is enough.
        """
        if self._searched:
            return
        self._searched = True
        seen: dict[int, tuple[Tensor, list[Tap]]] = {}  # inputs are kept alive, so that no id comes twice

        def note(tap: Tap, x: Tensor) -> None:
            seen.setdefault(id(x), (x, []))[1].append(tap)

        taps = [tap for group in self.groups for tap in group]
        for tap in taps:
            tap.watcher = note
        try:
            with torch.no_grad():
                run()
        finally:
            for tap in taps:
                tap.watcher = None
        called = [tap for _, readers in seen.values() for tap in readers]
        for _, readers in seen.values():
            # A layer that is called several times may read other inputs at other times.
            if len(readers) > 1 and all(called.count(tap) == 1 for tap in readers):
                shared = SharedInput(readers)
                for tap in readers:
                    tap.shared = shared

    def clear(self) -> None:
        """Forget all records."""
        for group in self.groups:
            for tap in group:
                tap.records.clear()


@contextmanager
def installed_taps(
    model: nn.Module,
    space: CoreSpace,
    core: Tensor | None = None,
    *,
    record: bool = False,
    backend: BackendName = "auto",
) -> Iterator[Taps]:
    """Make the model behave as a point of the core space while the block runs.

    Args:
        model: The base model, or a `peft.PeftModel`, whose adapters are switched off in the block. Its parameters must
            not require gradients if `record` is set.
        space: The core space of the adapters.
        core: The point, shape (D,); None or zero is the base model itself.
        record: Whether backward passes record scores.
        backend: What projects activations and gradients (`sstmerge.ops.project_accumulate`); "auto" takes the kernels on a
            GPU, and torch's matrix product, in the activations' own dtype, on a CPU.

    Yields:
        The taps.

    Raises:
        AdapterError: If a layer of the space is not in the model.
    """
    with ExitStack() as stack:
        modules = base_modules(model, stack)
        anchor = torch.zeros((), requires_grad=True) if record else None
        cores = None if core is None or not bool(core.any()) else space.split(core)
        groups: list[list[Tap]] = []
        missing: list[str] = []
        for i, group in enumerate(space.groups):
            taps: list[Tap] = []
            for j, name in enumerate(group.names):
                if name not in modules:
                    missing.append(name)
                    continue
                tap = Tap(name, group.U[j], group.V[j], None if cores is None else cores[i][j], anchor, backend)
                module = getattr(modules[name], "base_layer", modules[name])
                stack.callback(module.register_forward_hook(tap, with_kwargs=True).remove)
                taps.append(tap)
            groups.append(taps)
        if missing:
            raise AdapterError(
                f"{len(missing)} adapted layers are not in the model, such as '{missing[0]}'; the model's modules look "
                f"like '{_some_linear(modules)}'. The adapters belong to another base model."
            )
        yield Taps(groups)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without parameter gradients, and restore both afterwards.

    Args:
        model: The model.

    Yields:
        None.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        model.eval()
        with differentiable(model):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def base_modules(model: nn.Module, stack: ExitStack) -> dict[str, nn.Module]:
    """Return a model's modules by path; until the stack ends, a `PeftModel`'s adapters are off and nothing runs compiled."""
    stack.enter_context(eager(model))
    model = uncompiled(model)
    if not hasattr(model, "peft_config"):
        return dict(model.named_modules())
    if not hasattr(model, "get_base_model"):
        raise InputError(
            f"Expected a transformers model or a peft.PeftModel, but got {type(model).__name__} with adapters inside."
        )
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise InputError(
            "The PeftModel has its adapters merged into the base weights, so the base model is not at hand; call "
            "unmerge_adapter() on it first."
        )
    # PEFT makes the active adapter trainable again when the context ends, whether it was before or not.
    stack.callback(_restore_gradients, [(p, p.requires_grad) for p in model.parameters()])
    stack.enter_context(model.disable_adapter())  # type: ignore[operator]
    return dict(model.get_base_model().named_modules())  # type: ignore[operator]


def _restore_gradients(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def _some_linear(modules: dict[str, nn.Module]) -> str:
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    return linear[0] if linear else next(reversed(modules), "(no modules)")
