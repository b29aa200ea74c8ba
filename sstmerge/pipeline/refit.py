"""The rule `refit`: learn the coefficients again inside the selected subspace, bounded by measured KL.

From the projected safety adapter z₀, natural-gradient steps maximise the refusals' log-likelihood L(z) − ½ μ ‖z − z₀‖² in
the metric F_gain + μ F_cost. With F_cost the identity in these coordinates, a step is (Vᵀ∇L − μ (z − z₀)) / (λ + μ).
The quadratic model says nothing far from the reference (a prototype broke its model at a predicted KL of 0.02), and where
refusals are still unlikely the gradient asks for many times the adapter. So a step, and the point it leads to, are
no longer than what is predicted to spend the limit; what still measures a larger KL to the utility model on benign data is
drawn back towards that model by what was measured, and where that does not suffice, or the refusals do not become likelier,
the step is halved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sstmerge.adapters import CoreSpace
from sstmerge.errors import DataError, InputError
from sstmerge.evaluation.generate import evaluating
from sstmerge.fisher import Batch, collect_fisher, installed_taps
from sstmerge.fisher.head import Head
from sstmerge.fisher.placement import input_device
from sstmerge.gevp import Spectrum
from sstmerge.merging import Merge, Rule, Selection, merge_cores
from sstmerge.merging.sst import report
from sstmerge.pipeline.evaluate import kl_rows, mean_log_likelihood
from sstmerge.pipeline.progress import Progress, no_progress

# By how much the measured KL may exceed its limit, as a factor, and how often a trial is drawn back before it is given up.
SLACK = 1.001
DRAWS_BACK = 2


@dataclass(frozen=True)
class RefitOptions:
    """Options of the rule `refit`.

    Attributes:
        steps: Largest number of steps.
        mu: Weight μ of the pull back to the adapter, in units of λ.
        kl_limit: Largest measured KL to the utility model, nats per benign response token; by default that of the
            projected adapter the steps start from.
        halvings: How often a step is halved before refitting stops.
    """

    steps: int = 4
    mu: float = 1.0
    kl_limit: float | None = None
    halvings: int = 4

    def __post_init__(self) -> None:
        if self.steps < 1 or self.halvings < 0 or not self.mu > 0:
            raise InputError("refit needs steps >= 1, halvings >= 0 and mu > 0.")
        if self.kl_limit is not None and not self.kl_limit > 0:
            raise InputError(f"kl_limit must be a positive number of nats per token, but is {self.kl_limit}.")


def refit_cores(
    model: nn.Module,
    spectrum: Spectrum,
    utility: Tensor,
    safety: Tensor,
    harm: Sequence[Batch],
    benign: Sequence[Batch],
    *,
    scale: float | None = None,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    options: RefitOptions = RefitOptions(),
    progress: Progress = no_progress,
) -> Merge:
    """Project the safety adapter, then learn its coefficients again.

    Args:
        model: The base model.
        spectrum: The solved pair of Fishers.
        utility: φ_u, shape (D,), in `spectrum.space`.
        safety: φ_s, shape (D,), in the same space.
        harm: Harmful prompts with refusals.
        benign: Benign prompts with responses.
        scale: Scale of the projected adapter that is the start.
        selection: Directions of the subspace.
        options: Steps and limits.
        progress: Called after every trial.

    Returns:
        The merged point; its report has one warning if no step was accepted.
    """
    start = merge_cores(spectrum, utility, safety, rule=Rule.PROJECT, scale=scale, selection=selection)
    # Coordinates of directions that are not kept are zero but for rounding.
    mask = start.kept.double()
    origin = mask * spectrum.coordinates(start.core - utility)
    trials = options.steps * (options.halvings + 1)
    search = _Search(model, spectrum, utility, harm, benign)
    spent = search.measured_kl(start.core)
    limit = spent if options.kl_limit is None else options.kl_limit
    # KL grows with the square of the length, so the start tells which length is predicted to spend the limit.
    longest = float(origin.norm()) * ((limit / spent) ** 0.5 if spent > 0 else 1.0)
    point, best = origin, search.log_likelihood(start.core)
    accepted = done = 0
    for _ in range(options.steps):
        gradient = spectrum.pull_back(search.gradient(search.core(point)))
        step = mask * (gradient - options.mu * (point - origin)) / (spectrum.eigenvalues + options.mu)
        step = _within(step, longest)
        moved = False
        for halving in range(options.halvings + 1):
            done += 1
            progress("refit", done, trials)
            trial = search.drawn_back(_within(point + 0.5**halving * step, longest), limit)
            if trial is None:
                continue
            likelihood = search.log_likelihood(search.core(trial))
            if likelihood > best:
                point, best, moved = trial, likelihood, True
                accepted += 1
                break
        if not moved:
            break
    progress("refit", trials, trials)
    change = spectrum.combine(point) if accepted else start.core - utility
    summary = report(
        spectrum,
        safety,
        change,
        (spectrum.coordinates(safety), point),
        mask,
        Rule.REFIT,
        1.0 if start.report.scale is None else start.report.scale,
        options.mu,
    )
    if not accepted:
        sentence = "No refit step stayed within the measured KL limit and raised the refusals' likelihood."
        summary = replace(summary, warnings=(*summary.warnings, sentence))
    return Merge(utility + change, summary, start.kept)


def _within(vector: Tensor, longest: float) -> Tensor:
    """Return a vector, shortened to a length where it is longer."""
    return vector * min(1.0, longest / max(float(vector.norm()), torch.finfo(vector.dtype).tiny))


class _Search:
    """What refitting asks the model."""

    def __init__(
        self, model: nn.Module, spectrum: Spectrum, utility: Tensor, harm: Sequence[Batch], benign: Sequence[Batch]
    ) -> None:
        self.model = model
        self.spectrum = spectrum
        self.space = spectrum.space
        self.utility = utility
        self.harm = harm
        self.measured_kl = _Divergence(model, spectrum.space, utility, benign)

    def core(self, point: Tensor) -> Tensor:
        """Return φ_u + Σ c_i v_i for coordinates c (m,), shape (D,)."""
        return self.utility + self.spectrum.combine(point)

    def gradient(self, core: Tensor) -> Tensor:
        """Return ∇ of the refusals' log-likelihood per response token, shape (D,)."""
        fisher = collect_fisher(self.model, self.harm, self.space, structure="diagonal", labels="data", reference=core)
        return fisher.mean_score()

    def log_likelihood(self, core: Tensor) -> float:
        """Return the refusals' log-likelihood in nats per response token."""
        with installed_taps(self.model, self.space, core):
            return mean_log_likelihood(self.model, self.harm)

    def drawn_back(self, point: Tensor, limit: float) -> Tensor | None:
        """Return coordinates shortened until their measured KL is within a limit; None if that takes too many trials."""
        for attempt in range(DRAWS_BACK + 1):
            spent = self.measured_kl(self.core(point))
            # A little slack, so that a start on the limit may move along it.
            if spent <= SLACK * limit:
                return point
            # KL grows with the square of the length near the utility model, and more slowly far from it.
            point = point * (limit / spent) ** (0.5 * (attempt + 1))
        return None


class _Divergence:
    """KL(utility model ‖ merged model) in nats per benign response token; `measured_kl` for many merged models.

    Of the utility model the hidden states below the output head are kept, d numbers a response token, so that a trial takes
    one pass and not two.
    """

    def __init__(self, model: nn.Module, space: CoreSpace, utility: Tensor, batches: Sequence[Batch]) -> None:
        self._model, self._space, self._utility = model, space, utility
        self._head = Head(model)
        self._batches = [batch.to(input_device(model)) for batch in batches]
        if not any(bool(batch.loss_mask[:, 1:].any()) for batch in batches):
            raise DataError("The KL cannot be measured: no benign batch holds a response token.")
        with evaluating(model):
            self._hidden = [self._at(utility, batch) for batch in self._batches]

    def __call__(self, core: Tensor) -> float:
        """Return the KL of the merged model at a point, shape (D,)."""
        divergence = tokens = 0.0
        with evaluating(self._model):
            for batch, utility in zip(self._batches, self._hidden, strict=True):
                merged = self._at(core, batch)
                # The head itself may be adapted.
                with installed_taps(self._model, self._space, self._utility):
                    reference = self._head.logits(utility)
                with installed_taps(self._model, self._space, core):
                    logits = self._head.logits(merged)
                weight = batch.weight.double().repeat_interleave(batch.loss_mask[:, 1:].sum(dim=1))
                divergence += float((kl_rows(reference, logits).double() * weight).sum())
                tokens += float(weight.sum())
        return divergence / tokens

    def _at(self, core: Tensor, batch: Batch) -> Tensor:
        """Return the hidden states at the positions that predict a response token, (tokens, d)."""
        captured: list[Tensor] = []
        with installed_taps(self._model, self._space, core), self._head.capturing(captured):
            self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return captured[0][:, :-1][batch.loss_mask[:, 1:]]
