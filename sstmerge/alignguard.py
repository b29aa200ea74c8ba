"""AlignGuard-LoRA's training losses as a regulariser of a live PEFT model (Das et al. 2025, https://arxiv.org/abs/2508.02079).

With F the Fisher of safety data, P_A the projector on its top m eigenvectors, ΔW_A = P_A ΔW and ΔW_T = ΔW − ΔW_A:

    λ_A ‖F^½ ΔW_A‖² + λ_T ‖H^½ ΔW_T‖² + λ_NC [α E_RM + (1 − α) E_geo],  summed over layers
    E_RM  = mean_ij η_ij |ΔW_A,ij ΔW_T,ij|,  η_ij = 1 + β σ(|ΔW_ij| − τ)
    E_geo = ⟨ΔW_A, ΔW_T⟩_H² / (‖ΔW_A‖_H² ‖ΔW_T‖_H²)

A re-implementation from the paper's formulas: its own code has other losses, and its own constants were not to be had; the
defaults are those of other re-implementations. Choices where the formulas leave one: F acts on the outputs of a layer,
F = E[δ δᵀ] with δ the gradient of a safety response's log-likelihood with respect to the layer's output, so that P_A
multiplies ΔW from the left and nothing of size d_out x d_out is formed; H is diagonal over the outputs, the identity by
default. Because P_A is orthogonal, E_geo is zero for H = I (and for H = F): it only acts with another H.

    curvatures = safety_curvatures(model, safety_batches, directions=64)   # before training, at the aligned model
    regularizer = AlignGuardRegularizer(curvatures)
    loss = model(**batch).loss + regularizer(model).total
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sstmerge.adapters import LoraFactors
from sstmerge.adapters.live import live_layers
from sstmerge.errors import InputError

# Entries of ΔW that are formed at once for E_RM, which looks at every one of them; the backward pass forms them again.
_ENTRIES_PER_CHUNK = 2**22
# Singular values up to this share of the largest are rounding.
_RANK_TOLERANCE = 1e-6
# A part of ΔW whose norm is at most so many roundings of the whole counts as zero.
_ROUNDINGS = 64


@dataclass(frozen=True)
class SafetyCurvature:
    """The top eigenvectors of one layer's safety Fisher on its outputs, F = U diag(values) Uᵀ.

    Attributes:
        vectors: U, orthonormal columns, shape (d_out, m).
        values: Eigenvalues, shape (m,), falling.
    """

    vectors: Tensor
    values: Tensor


@dataclass(frozen=True)
class AlignGuardTerms:
    """The terms of the loss, each a scalar tensor, summed over layers.

    Attributes:
        alignment: ‖F^½ ΔW_A‖².
        task: ‖H^½ ΔW_T‖².
        riemannian: E_RM.
        geodesic: E_geo.
        total: The weighted sum, which is what is added to the task's loss.
    """

    alignment: Tensor
    task: Tensor
    riemannian: Tensor
    geodesic: Tensor
    total: Tensor


class AlignGuardRegularizer(nn.Module):
    """λ_A ‖F^½ ΔW_A‖² + λ_T ‖H^½ ΔW_T‖² + λ_NC [α E_RM + (1 − α) E_geo] of a live PEFT model.

    Args:
        curvatures: Safety curvature by module path (`safety_curvatures`), for every LoRA layer.
        task_curvatures: Diagonal of H over the outputs of a layer, shape (d_out,), by module path; the identity where None.
        adapter_name: Name of the adapter that is trained.
        alignment_weight: λ_A.
        task_weight: λ_T.
        overlap_weight: λ_NC.
        riemannian_share: α.
        steepness: β.
        threshold: τ.

    Raises:
        InputError: A weight is negative or not finite, a share is outside [0, 1], or tensors do not fit together.
    """

    def __init__(
        self,
        curvatures: Mapping[str, SafetyCurvature],
        *,
        task_curvatures: Mapping[str, Tensor] | None = None,
        adapter_name: str = "default",
        alignment_weight: float = 0.25,
        task_weight: float = 0.5,
        overlap_weight: float = 0.1,
        riemannian_share: float = 0.5,
        steepness: float = 4.0,
        threshold: float = 0.01,
    ) -> None:
        super().__init__()
        weights = {"alignment_weight": alignment_weight, "task_weight": task_weight, "overlap_weight": overlap_weight}
        for name, value in {**weights, "steepness": steepness, "threshold": threshold}.items():
            if not 0.0 <= value < math.inf:
                raise InputError(f"{name} must be a finite number >= 0, but is {value}.")
        if not 0.0 <= riemannian_share <= 1.0:
            raise InputError(f"riemannian_share must lie in [0, 1], but is {riemannian_share}.")
        _check_curvatures(curvatures, task_curvatures)
        self.adapter_name = adapter_name
        self.alignment_weight, self.task_weight, self.overlap_weight = alignment_weight, task_weight, overlap_weight
        self.riemannian_share, self.steepness, self.threshold = riemannian_share, steepness, threshold
        self.layers = tuple(curvatures)
        # Module paths hold dots, which names of buffers must not; buffers follow `.to(device)`.
        for i, (path, curvature) in enumerate(curvatures.items()):
            task = torch.ones(len(curvature.vectors)) if task_curvatures is None else task_curvatures[path]
            for name, tensor in (("vectors", curvature.vectors), ("values", curvature.values), ("task", task)):
                self.register_buffer(f"{name}_{i}", tensor.detach().clone())

    def forward(self, model: nn.Module) -> AlignGuardTerms:
        """Return the terms for the model's LoRA factors as they are now, differentiable with respect to them.

        Args:
            model: The `peft.PeftModel` that is trained.

        Returns:
            The terms.

        Raises:
            InputError: The model's LoRA layers are not those of the curvatures, or have other shapes.
        """
        factors = {path: layer for path, (_, layer) in live_layers(model, self.adapter_name).items()}
        if set(factors) != set(self.layers):
            differing = sorted(set(factors) ^ set(self.layers))
            raise InputError(
                f"The regulariser was made for other LoRA layers than the model has; they differ in {differing[:4]}. "
                "Collect the safety curvatures from this model."
            )
        sums: list[Tensor] = []
        for i, path in enumerate(self.layers):
            vectors, values, task = (self.get_buffer(f"{name}_{i}") for name in ("vectors", "values", "task"))
            if factors[path].shape[0] != len(vectors):
                raise InputError(
                    f"Layer '{path}' has {factors[path].shape[0]} outputs, but its safety curvature has {len(vectors)}."
                )
            sums.append(
                layer_terms(factors[path], SafetyCurvature(vectors, values), task, self.steepness, self.threshold)
            )
        alignment, task_term, riemannian, geodesic = torch.stack(sums).sum(dim=0).unbind()
        overlap = self.riemannian_share * riemannian + (1.0 - self.riemannian_share) * geodesic
        total = self.alignment_weight * alignment + self.task_weight * task_term + self.overlap_weight * overlap
        return AlignGuardTerms(alignment, task_term, riemannian, geodesic, total)


def layer_terms(
    factors: LoraFactors, curvature: SafetyCurvature, task: Tensor, steepness: float, threshold: float
) -> Tensor:
    """Return ‖F^½ ΔW_A‖², ‖H^½ ΔW_T‖², E_RM and E_geo of one layer.

    Args:
        factors: The factors; at least float32 is computed with.
        curvature: Its safety curvature.
        task: Diagonal of H, shape (d_out,).
        steepness: β.
        threshold: τ.

    Returns:
        Shape (4,), differentiable with respect to A and B.
    """
    dtype = torch.promote_types(factors.B.dtype, torch.float32)
    A, B = factors.A.to(dtype), factors.scaling * factors.B.to(dtype)
    U, values, H = (t.to(device=B.device, dtype=dtype) for t in (curvature.vectors, curvature.values, task))
    coordinates = U.mT @ B
    B_A = U @ coordinates
    B_T = B - B_A
    gram = A @ A.mT

    def inner(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
        """Return ⟨left A, right A⟩ with rows weighted, from the small Gram matrix of A."""
        return ((weights[:, None] * left).mT @ right * gram).sum()

    alignment = inner(coordinates, coordinates, values)
    task_norm, aligned_norm = inner(B_T, B_T, H), inner(B_A, B_A, H)
    product = aligned_norm * task_norm
    # Where either part is zero, or the rounding of a zero, nothing overlaps and the quotient is noise over noise.
    overlaps = product > (_ROUNDINGS * torch.finfo(dtype).eps * (aligned_norm + task_norm)).square()
    geodesic = torch.where(overlaps, inner(B_A, B_T, H).square() / product.where(overlaps, 1.0), 0.0)
    rows = max(1, _ENTRIES_PER_CHUNK // A.shape[1])
    parts: list[Tensor] = [
        checkpoint(_overlap, *pair, A, steepness, threshold, use_reentrant=False)
        for pair in zip(B_A.split(rows), B_T.split(rows), strict=True)
    ]
    riemannian = torch.stack(parts).sum() / (B.shape[0] * A.shape[1])
    return torch.stack([alignment, task_norm, riemannian, geodesic])


def _overlap(B_A: Tensor, B_T: Tensor, A: Tensor, steepness: float, threshold: float) -> Tensor:
    """Return Σ_ij η_ij |ΔW_A,ij ΔW_T,ij| over some rows."""
    aligned, task = B_A @ A, B_T @ A
    eta = 1.0 + steepness * torch.sigmoid((aligned + task).abs() - threshold)
    return (eta * (aligned * task).abs()).sum()


def safety_curvatures(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    directions: int = 1024,
    normalize: bool = True,
    adapter_name: str = "default",
) -> dict[str, SafetyCurvature]:
    """Collect F = E[δ δᵀ] on the outputs of every LoRA layer, δ the gradient of a response's log-likelihood.

    Call it at the aligned model: before training, while B = 0. The model's weights and gradients are left alone. Of more
    response tokens than 2 · directions, the rank of the sum is cut to `directions` again and again, which is exact while
    the gradients span no more than that.

    Args:
        model: A `peft.PeftModel` of a causal language model.
        batches: Safety data: `input_ids`, `attention_mask` and `labels` (-100 where no loss is taken), shape (B, S) each.
        directions: Eigenvectors kept per layer, m.
        normalize: Divide all layers' eigenvalues by the largest one. Gradients vanish as the aligned model fits its
            refusals, and λ_A would lose its meaning with them; False gives eigenvalues per response token.
        adapter_name: Name of the adapter.

    Returns:
        Curvature by module path; layers with fewer nonzero eigenvalues keep fewer.

    Raises:
        InputError: `directions` is below 1, there is no response token, or some layer receives no gradient.
    """
    if directions < 1:
        raise InputError(f"directions must be at least 1, but is {directions}.")
    layers = {path: module for path, (module, _) in live_layers(model, adapter_name).items()}
    sketches: dict[str, list[Tensor]] = {path: [] for path in layers}
    outputs: dict[str, list[Tensor]] = {path: [] for path in layers}
    tokens, training = 0, model.training
    hooks = [module.register_forward_hook(_recorder(outputs[path])) for path, module in layers.items()]
    try:
        model.eval()
        with torch.enable_grad():
            for batch in batches:
                count = int((batch["labels"][:, 1:] != -100).sum())
                if count:
                    _add_gradients(count * model(**batch).loss, outputs, sketches, directions)
                    tokens += count
                for recorded in outputs.values():
                    recorded.clear()
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise InputError("The safety data hold no response token (no label other than -100).")
    curvatures = {path: _eigenvectors(path, rows, directions, tokens) for path, rows in sketches.items()}
    if not normalize:
        return curvatures
    largest = max(float(curvature.values[0]) for curvature in curvatures.values())
    return {path: SafetyCurvature(c.vectors, c.values / largest) for path, c in curvatures.items()}


def _recorder(recorded: list[Tensor]) -> Any:
    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        recorded.append(output)

    return record


def _add_gradients(
    loss: Tensor, outputs: dict[str, list[Tensor]], sketches: dict[str, list[Tensor]], directions: int
) -> None:
    """Add δ of every token to every layer's sketch."""
    pairs = [(path, output) for path, recorded in outputs.items() for output in recorded]
    if not all(output.requires_grad for _, output in pairs):
        raise InputError(
            "Some LoRA layer takes no part in training, so no gradient reaches it: make the adapter active and trainable."
        )
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, [output for _, output in pairs], allow_unused=True)
    for (path, _), gradient in zip(pairs, gradients, strict=True):
        if gradient is None:
            continue
        rows = gradient.detach().flatten(0, -2).float()
        sketches[path].append(rows[rows.count_nonzero(dim=1) > 0])
        if sum(map(len, sketches[path])) > 2 * directions:
            values, vectors = _singular(torch.cat(sketches[path]), directions)
            sketches[path] = [values[:, None] * vectors.mT]


def _singular(rows: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular values (k,) and right singular vectors (d_out, k) of some rows."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    kept = min(directions, int((values > _RANK_TOLERANCE * values[:1]).sum()))
    return values[:kept], vectors[:kept].mT


def _eigenvectors(path: str, rows: list[Tensor], directions: int, tokens: int) -> SafetyCurvature:
    gathered = torch.cat(rows) if rows else torch.zeros(0, 1)
    if not bool(gathered.count_nonzero()):
        raise InputError(f"The safety data never reach layer '{path}': its output gradients are all zero.")
    values, vectors = _singular(gathered, directions)
    return SafetyCurvature(vectors.contiguous(), values.square() / tokens)


def _check_curvatures(curvatures: Mapping[str, SafetyCurvature], task: Mapping[str, Tensor] | None) -> None:
    if not curvatures:
        raise InputError("No safety curvature was given; collect them with safety_curvatures(model, batches).")
    if task is not None and set(task) != set(curvatures):
        raise InputError(
            f"task_curvatures must name the layers of the safety curvatures; they differ in "
            f"{sorted(set(task) ^ set(curvatures))[:4]}."
        )
    for path, curvature in curvatures.items():
        shape = tuple(curvature.vectors.shape)
        if len(shape) != 2 or curvature.values.shape != shape[1:]:
            raise InputError(
                f"The safety curvature of '{path}' needs vectors (d_out, m) and values (m,), but has shapes {shape} and "
                f"{tuple(curvature.values.shape)}."
            )
        gram = curvature.vectors.double().mT @ curvature.vectors.double()
        if not torch.allclose(gram, torch.eye(shape[1], dtype=gram.dtype, device=gram.device), rtol=0.0, atol=1e-3):
            raise InputError(f"The vectors of the safety curvature of '{path}' are not orthonormal.")
        if not bool((curvature.values >= 0).all()):
            raise InputError(f"The safety curvature of '{path}' has negative or NaN eigenvalues.")
        if task is not None and (task[path].shape != shape[:1] or not bool((task[path] >= 0).all())):
            raise InputError(f"The task curvature of '{path}' must have shape {shape[:1]} and entries >= 0.")
