"""The whole job in one call: base model, adapters and prompts in, one merged adapter out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sstmerge.adapters import Adapter, save_adapter
from sstmerge.atomic import refuse_existing
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher import Fisher
from sstmerge.gevp import Spectrum, solve
from sstmerge.merging import Merge, Rule, Selection, merge_cores
from sstmerge.merging.stability import Stability, split_half_stability
from sstmerge.pipeline.calibration import (
    CollectionOptions,
    batches_of,
    choose_modules,
    collect_pair,
    complete,
    load_all,
    refused,
)
from sstmerge.pipeline.merge_checks import check_merge, check_rule
from sstmerge.pipeline.models import load_model, load_tokenizer
from sstmerge.pipeline.progress import Progress, no_progress
from sstmerge.pipeline.refit import RefitOptions, refit_cores
from sstmerge.pipeline.roles import AdapterSource, Roles, expand_reference, load_named, load_roles, roles_in, with_space
from sstmerge.pipeline.run import Run
from sstmerge.pipeline.sketch_job import load_fishers

REPORT_FILE = "sstmerge_report.json"


@dataclass(frozen=True)
class MergeResult:
    """What `merge` returns.

    Attributes:
        adapter: The merged adapter, ready for `sstmerge.save_adapter`.
        merge: The merged coordinates and their report.
        gain: F_gain.
        cost: F_cost.
        spectrum: The solved pair.
        stability: Agreement of the split halves; None where it was not asked for, a half of the data is empty, or
            no direction has a gain.
    """

    adapter: Adapter
    merge: Merge
    gain: Fisher
    cost: Fisher
    spectrum: Spectrum
    stability: Stability | None

    def report(self) -> dict[str, Any]:
        """Return everything worth keeping beside the adapter, as plain data for JSON."""
        return {
            "merge": self.merge.report.to_dict(),
            "stability": None if self.stability is None else self.stability.to_dict(),
            "gain": dict(self.gain.metadata),
            "cost": dict(self.cost.metadata),
        }

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the adapter as a PEFT directory, with the report beside it.

        Args:
            directory: Directory to create.
            overwrite: Replace it if it exists.

        Returns:
            The directory.
        """
        report = json.dumps(self.report(), indent=2) + "\n"
        return save_adapter(self.adapter, directory, overwrite=overwrite, extra_files={REPORT_FILE: report})


def merge(
    base: str | nn.Module | Callable[[], nn.Module],
    *,
    utility: AdapterSource | Sequence[AdapterSource] = (),
    safety: AdapterSource,
    harm: str | Path | Sequence[str | Path],
    benign: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    rule: str = "project",
    scale: float | None = None,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    options: CollectionOptions = CollectionOptions(),  # noqa: B008 (frozen)
    damping: float | None = None,
    utility_weights: Sequence[float] | None = None,
    rank: int | None = None,
    refit: RefitOptions = RefitOptions(),  # noqa: B008 (frozen)
    split: str | None = None,
    limit: int | None = None,
    tokenizer: Any = None,
    stability: bool = True,
    overwrite: bool = False,
    ignore_base_name: bool = False,
    progress: Progress = no_progress,
    run: Run = Run(),  # noqa: B008 (frozen)
) -> MergeResult:
    """Merge a safety adapter into utility adapters by measured effect.

    Args:
        base: Base model: directory, hub id, or a loaded transformers model or what loads it after all cheap checks (then
            give its tokenizer).
        utility: Utility adapters: PEFT directories, hub ids, `Adapter`s or live `PeftModel`s; none means the base model.
        safety: The safety adapter.
        harm: Prompt files of harmful requests with refusals.
        benign: Prompt files of benign requests; rows without a response are answered by the reference model.
        out: Directory to write the merged PEFT adapter to; None writes nothing.
        rule: `project`, `wiener`, `joint` or `refit`.
        scale: Factor of the safety adapter.
        selection: Which directions are kept.
        options: How the Fishers are collected; `reference="utility"` is the model with all utility adapters.
        damping: Relative damping of F_cost; the structure's default where None.
        utility_weights: One weight per utility adapter; 1 by default.
        rank: Rank limit of the result; lossless by default.
        refit: Options of the rule `refit`.
        split: Use only rows of this split of the prompt files.
        limit: Use only the first so many rows of each prompt file.
        tokenizer: Tokenizer; loaded with the base model by default.
        stability: Also solve the split halves and report how far they agree.
        overwrite: Replace `out` if it exists.
        ignore_base_name: Accept adapters whose recorded base models differ by name.
        progress: Called with what is being done, how much is done, and how much there is.
        run: The processes that share the work, all of which call this function and of which the first one writes, and
            the folder where they keep what is collected (`sstmerge.pipeline.run.opened_run`).

    Returns:
        The adapter with its report, Fishers and spectrum.

    Raises:
        InputError: If an input is unusable; the subclass and the message say which and how to fix it.
    """
    if out is not None:
        refuse_existing(out, overwrite=overwrite)
    roles = load_roles(utility, safety, utility_weights, ignore_base_name=ignore_base_name)
    parsed = check_merge(
        roles.space, rule, scale=scale, selection=selection, damping=damping, rank=rank, options=options
    )
    roles = with_space(roles, run.same_space(roles.space), utility_weights)
    options = replace(options, reference=expand_reference(options.reference, roles))
    harm_examples = load_all(harm, split=split, limit=limit)
    benign_examples = load_all(benign, split=split, limit=limit)
    if any(example.response is None for example in harm_examples):
        raise InputError("Every harmful prompt needs a response, the refusal: F_gain measures what makes it likelier.")
    model, tokenizer = _model_and_tokenizer(base, tokenizer)
    benign_examples = complete(
        model,
        tokenizer,
        benign_examples,
        roles.space,
        options.reference,
        max_new_tokens=options.completion_tokens,
        progress=progress,
        run=run,
    )
    harm_batches = batches_of(model, tokenizer, harm_examples, options)
    benign_batches = batches_of(model, tokenizer, benign_examples, options)
    space, notes = roles.space, list[str]()
    if options.module_share is not None:
        chosen = choose_modules(model, space, harm_batches, benign_batches, options, progress=progress, run=run)
        space, notes = chosen.space, [chosen.sentence()]
    pair = collect_pair(
        model,
        space,
        harm_batches,
        benign_batches,
        options,
        refusals=batches_of(model, tokenizer, refused(benign_examples, harm_examples, options), options),
        home=roles.space,
        progress=progress,
        run=run,
        step=partial(_step, roles, rule=parsed, scale=scale, selection=selection),
        damping=damping,
    )
    spectrum = solve(*pair, damping=damping, ranks=run.ranks)
    if parsed is Rule.REFIT:
        merged = refit_cores(
            model,
            spectrum,
            roles.utility,
            roles.safety,
            harm_batches,
            benign_batches,
            scale=scale,
            selection=selection,
            options=refit,
            progress=progress,
        )
    else:
        merged = merge_in_part(roles, spectrum, rule=parsed, scale=scale, selection=selection, notes=notes)
    result = finish(roles, merged, spectrum, rank=rank, stability=stability)
    if out is not None and run.ranks.first:
        result.save(out, overwrite=overwrite)
    return result


def _step(roles: Roles, spectrum: Spectrum, *, rule: Rule, scale: float | None, selection: Selection) -> Tensor:
    """Return the change of the utility model that the merge would make now, shape (D,), in the spectrum's space."""
    if selection.top is not None:  # few samples list few directions
        selection = replace(selection, top=min(selection.top, len(spectrum.eigenvalues)))
    rule = Rule.PROJECT if rule is Rule.REFIT else rule  # which starts from it
    change = merge_in_part(roles, spectrum, rule=rule, scale=scale, selection=selection).core - roles.utility
    return change if spectrum.space is roles.space else spectrum.space.embed(change, roles.space)


def merge_in_part(
    roles: Roles,
    spectrum: Spectrum,
    *,
    rule: Rule,
    scale: float | None = None,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    notes: Sequence[str] = (),
) -> Merge:
    """Merge where the spectrum's space may be only a part of the adapters' space (a module filter).

    The safety adapter enters with its projection on that part; the utility adapters are kept whole.

    Args:
        roles: The adapters in their whole space.
        spectrum: The solved pair of Fishers.
        rule: `project`, `wiener` or `joint`.
        scale: Factor of the safety adapter.
        selection: Which directions.
        notes: Sentences to add to the report's warnings.

    Returns:
        The merged point of the whole space.
    """
    part = spectrum.space
    utility, safety = (
        part.embed(v, roles.space) if part is not roles.space else v for v in (roles.utility, roles.safety)
    )
    merged = merge_cores(spectrum, utility, safety, rule=rule, scale=scale, selection=selection)
    report = replace(merged.report, warnings=(*notes, *merged.report.warnings))
    if part is roles.space:
        return replace(merged, report=report)
    report = replace(report, norm_task_arithmetic=abs(report.scale) * float(roles.safety.norm()))
    core = roles.utility + roles.space.embed(merged.core - utility, part)
    return replace(merged, core=core, report=report)


def merge_from_fishers(
    gain: str | Path,
    cost: str | Path,
    *,
    utility: AdapterSource | Sequence[AdapterSource] = (),
    safety: AdapterSource,
    out: str | Path | None = None,
    rule: str = "project",
    scale: float | None = None,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    damping: float | None = None,
    utility_weights: Sequence[float] | None = None,
    rank: int | None = None,
    stability: bool = True,
    overwrite: bool = False,
    ignore_base_name: bool = False,
) -> MergeResult:
    """Merge with Fishers that were collected before; no model is loaded.

    Args:
        gain: Fisher file of harmful prompts, or a sketch of the base model, which fits any of its adapters.
        cost: The same of benign prompts.
        utility: Utility adapters, as in `merge`.
        safety: The safety adapter.
        out: Directory to write; None writes nothing.
        rule: `project`, `wiener` or `joint`.
        scale: Factor of the safety adapter.
        selection: Which directions are kept.
        damping: Relative damping.
        utility_weights: One weight per utility adapter.
        rank: Rank limit.
        stability: Also solve the split halves.
        overwrite: Replace `out`.
        ignore_base_name: Accept different base model names.

    Returns:
        The adapter with its report, Fishers and spectrum.
    """
    if out is not None:
        refuse_existing(out, overwrite=overwrite)
    parsed = check_rule(rule, scale, selection, damping)
    roles, spectrum = load_solved(
        gain,
        cost,
        utility=utility,
        safety=safety,
        damping=damping,
        utility_weights=utility_weights,
        ignore_base_name=ignore_base_name,
    )
    merged = merge_cores(spectrum, roles.utility, roles.safety, rule=parsed, scale=scale, selection=selection)
    result = finish(roles, merged, spectrum, rank=rank, stability=stability)
    if out is not None:
        result.save(out, overwrite=overwrite)
    return result


def load_solved(
    gain: str | Path,
    cost: str | Path,
    *,
    utility: AdapterSource | Sequence[AdapterSource],
    safety: AdapterSource,
    damping: float | None = None,
    utility_weights: Sequence[float] | None = None,
    ignore_base_name: bool = False,
) -> tuple[Roles, Spectrum]:
    """Load two Fisher files, or sketches of the base model, with their adapters and solve them.

    Args:
        gain: Fisher file or sketch of harmful prompts.
        cost: Fisher file or sketch of benign prompts.
        utility: Utility adapters.
        safety: The safety adapter.
        damping: Relative damping.
        utility_weights: One weight per utility adapter.
        ignore_base_name: Accept different base model names.

    Returns:
        The adapters in the Fishers' space, and the spectrum.

    Raises:
        FisherError: If the two files were collected on different base models.
    """
    named = load_named(utility, safety)
    gain_fisher, cost_fisher = load_fishers([gain, cost], named, ignore_base_name=ignore_base_name)
    if gain_fisher.metadata.get("model") != cost_fisher.metadata.get("model"):
        raise FisherError(f"'{gain}' and '{cost}' were collected on different base models; collect one of them again.")
    space = gain_fisher.space
    names = [adapter.name for adapter in named]
    roles = roles_in(space, names[:-1], names[-1], utility_weights)
    return roles, solve(gain_fisher, cost_fisher, damping=damping)


def finish(
    roles: Roles, merged: Merge, spectrum: Spectrum, *, rank: int | None = None, stability: bool = True
) -> MergeResult:
    """Write merged coordinates back as an adapter, and gather what belongs to it.

    Args:
        roles: The adapters.
        merged: The merged coordinates.
        spectrum: The solved pair.
        rank: Rank limit.
        stability: Also solve the split halves.

    Returns:
        The result.
    """
    adapter = roles.space.to_adapter(merged.core, name="merged", rank=rank)
    if rank is not None and (cut := roles.space.beyond_rank(merged.core, rank)):
        sentence = (
            f"The rank limit of {rank} cuts off {cut / float(merged.core.norm()):.1%} of the merged adapter's norm, utility "
            "adapters included; all numbers here are those of the merge without the limit."
        )
        merged = replace(merged, report=replace(merged.report, warnings=(*merged.report.warnings, sentence)))
    agreement = None
    # A global gain of zero has no direction at all, so there is nothing to compare.
    if stability and len(spectrum.eigenvalues) and _both_halves_have_tokens(spectrum):
        source = roles.safety - roles.utility if merged.report.rule == Rule.JOINT else roles.safety
        source = source if spectrum.space is roles.space else spectrum.space.embed(source, roles.space)
        agreement = _stability(spectrum, source, merged)
    return MergeResult(adapter, merged, spectrum.gain, spectrum.cost, spectrum, agreement)


def _stability(spectrum: Spectrum, source: Tensor, merged: Merge) -> Stability:
    """Judge the halves by the same rule; those of `refit` by the projection that it starts from."""
    report = merged.report
    return split_half_stability(
        spectrum,
        source,
        kept=int(merged.kept.count_nonzero()),
        mu=0.0 if report.rule == Rule.REFIT else report.mu or 0.0,
        exponent=report.exponent,
        # No shrinkage of any direction is the whole adapter, also what lies in none (`merge_cores`).
        rest=1.0 if report.mu == 0.0 and bool(merged.kept.all()) else 0.0,
        scale=report.scale,
    )


def _both_halves_have_tokens(spectrum: Spectrum) -> bool:
    return all(bool((fisher.counts.tokens > 0).all()) for fisher in (spectrum.gain, spectrum.cost))


def _model_and_tokenizer(base: str | nn.Module | Callable[[], nn.Module], tokenizer: Any) -> tuple[nn.Module, Any]:
    if not isinstance(base, str):
        if tokenizer is None:
            raise InputError("A loaded model was given without its tokenizer; pass tokenizer=.")
        return base if isinstance(base, nn.Module) else base(), tokenizer
    return load_model(base), tokenizer or load_tokenizer(base)
