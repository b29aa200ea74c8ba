"""What a model does: refusal, over-refusal, utility, degenerate output and the measured KL to a reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sstmerge.atomic import atomic_file
from sstmerge.errors import DataError, OutputError
from sstmerge.evaluation.generate import evaluating, generate
from sstmerge.evaluation.judges import StringJudge
from sstmerge.evaluation.outcomes import OutcomeCounts
from sstmerge.evaluation.rates import Rate as Rate  # a public name of this module, too
from sstmerge.evaluation.text import exact_match
from sstmerge.fisher.batch import Batch
from sstmerge.fisher.placement import input_device
from sstmerge.prompts import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Logit rows that are turned into float32 at a time: 256 × 128k × 4 bytes = 131 MB.
ROWS_PER_CHUNK = 256


@dataclass(frozen=True)
class PromptSets:
    """What a model is evaluated on; an empty set is left out.

    Attributes:
        harmful: Requests that should be refused.
        benign: Ordinary requests that should be answered.
        borderline: Requests that only look harmful and should be answered.
        utility: Tasks whose response must be met exactly; every example needs one.
    """

    harmful: Sequence[Example] = ()
    benign: Sequence[Example] = ()
    borderline: Sequence[Example] = ()
    utility: Sequence[Example] = ()


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model; None where there was nothing to measure.

    Attributes:
        name: Name of the model or method.
        refusal_harmful: Share of harmful prompts refused, fully or in part (higher is safer).
        refusal_borderline: Share of borderline prompts refused (over-refusal).
        refusal_benign: Share of ordinary prompts refused (over-refusal).
        utility_exact_match: Share of utility tasks answered exactly.
        degenerate: Share of completions of harmful, borderline and benign prompts that say nothing (empty, loops, bare
            labels): neither refusal nor help.
        kl_to_reference: KL(p_reference ‖ p_model) in nats per response token.
        counts: For each prompt set but the utility tasks the number of completions of each outcome; every completion has
            exactly one.
        completions: For each prompt set the completions, in the order of the prompts.
    """

    name: str
    refusal_harmful: Rate | None
    refusal_borderline: Rate | None
    refusal_benign: Rate | None
    utility_exact_match: Rate | None
    degenerate: Rate | None
    kl_to_reference: float | None
    counts: Mapping[str, OutcomeCounts]
    completions: Mapping[str, Sequence[str]]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content["counts"] = {name: asdict(counts) for name, counts in self.counts.items()}
        return {name: value.to_json() if isinstance(value, Rate) else value for name, value in content.items()}


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_sets: PromptSets,
    *,
    name: str,
    max_new_tokens: int = 16,
    utility_new_tokens: int = 40,
    batch_size: int = 128,
    kl_to_reference: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Let a model answer every prompt greedily and judge the answers.

    Args:
        model: A causal language model, or a PEFT model around one.
        tokenizer: Its tokenizer.
        prompt_sets: The prompts.
        name: Name of the model in tables.
        max_new_tokens: Longest answer to a harmful, borderline or benign prompt; refusal shows in the first few tokens.
        utility_new_tokens: Longest answer to a utility task.
        batch_size: Number of prompts decoded together.
        kl_to_reference: What `measured_kl` found, to be kept with the rest.
        progress: Called with the number of prompts just finished.

    Returns:
        The evaluation.

    Raises:
        DataError: If there are no prompts at all, or a utility task has no response.
    """
    sets = {key: getattr(prompt_sets, key) for key in PromptSets.__dataclass_fields__ if getattr(prompt_sets, key)}
    if not sets:
        raise DataError("There is nothing to evaluate: every prompt set is empty.")
    for example in prompt_sets.utility:
        if example.response is None:
            raise DataError(f"{example.source} has no response; a utility task needs one to be compared with.")
    # Prompts with answers of one length are decoded together, since a decoding step costs little more for more of them.
    chat = [key for key in sets if key != "utility"]
    completions: dict[str, list[str]] = {}
    for keys, length in ((chat, max_new_tokens), ([key for key in sets if key == "utility"], utility_new_tokens)):
        examples = [example for key in keys for example in sets[key]]
        if not examples:
            continue
        answers = generate(model, tokenizer, examples, max_new_tokens=length, batch_size=batch_size, progress=progress)
        for key in keys:
            completions[key], answers = answers[: len(sets[key])], answers[len(sets[key]) :]
    return judge_completions(prompt_sets, completions, name=name, kl_to_reference=kl_to_reference)


def judge_completions(
    prompt_sets: PromptSets,
    completions: Mapping[str, Sequence[str]],
    *,
    name: str,
    kl_to_reference: float | None = None,
) -> Evaluation:
    """Judge completions that are already there.

    Args:
        prompt_sets: The prompts, and the responses to utility tasks.
        completions: For each prompt set ("harmful", "borderline", "benign", "utility") the completions, in order.
        name: Name of the model in tables.
        kl_to_reference: KL to the reference in nats per response token.

    Returns:
        The evaluation; None for every set without completions.

    Raises:
        InputError: If there is not one completion for each prompt.
    """
    counts = {
        key: OutcomeCounts.of(StringJudge().judge([example.prompt for example in getattr(prompt_sets, key)], texts))
        for key, texts in completions.items()
        if key != "utility"
    }
    answers = zip(completions["utility"], prompt_sets.utility, strict=True) if "utility" in completions else ()
    matches = [exact_match(text, example.response or "") for text, example in answers]
    total = sum(count.total for count in counts.values())
    return Evaluation(
        name=name,
        refusal_harmful=counts["harmful"].refused if "harmful" in counts else None,
        refusal_borderline=counts["borderline"].refused if "borderline" in counts else None,
        refusal_benign=counts["benign"].refused if "benign" in counts else None,
        utility_exact_match=Rate(sum(matches), len(matches)) if matches else None,
        degenerate=Rate(sum(count.degenerate for count in counts.values()), total) if total else None,
        kl_to_reference=kl_to_reference,
        counts=counts,
        completions={key: list(texts) for key, texts in completions.items()},
    )


# ---- measured KL ---------------------------------------------------------------------------------------------------


def measured_kl(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    reference_state: Callable[[], AbstractContextManager[Any]],
    merged_state: Callable[[], AbstractContextManager[Any]],
    *,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Measure KL(p_reference ‖ p_model) between two states of one model.

    Both states see a batch one after the other, so that nothing of size (all tokens) × vocabulary is kept; the
    softmaxes are taken in float32, `ROWS_PER_CHUNK` tokens at a time.

    Args:
        model: The model.
        batches: Prompts with responses.
        reference_state: Makes a context manager inside which `model` is the reference.
        merged_state: Makes a context manager inside which `model` is the model to be measured.
        progress: Called with the number of sequences just finished.

    Returns:
        Nats per response token: Σ_n w_n Σ_t KL_nt / Σ_n w_n T_n, with the weights of the sequences w_n and their
        numbers of response tokens T_n.

    Raises:
        DataError: If the batches hold no response token.
    """
    device = input_device(model)
    divergence = tokens = 0.0
    with evaluating(model):
        for batch in batches:
            batch_on_device = batch.to(device)
            with reference_state():
                reference = _response_logits(model, batch_on_device)
            with merged_state():
                merged = _response_logits(model, batch_on_device)
            weight = batch_on_device.weight.double().repeat_interleave(batch_on_device.loss_mask.sum(dim=1))
            divergence += float((kl_rows(reference, merged).double() * weight).sum())
            tokens += float(weight.sum())
            if progress is not None:
                progress(len(batch.index))
    if not tokens:
        raise DataError("The KL cannot be measured: no batch holds a response token.")
    return divergence / tokens


def mean_log_likelihood(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Return the log-likelihood of the responses, in nats per response token.

    Args:
        model: The model, in the state that is to be measured.
        batches: Prompts with responses.

    Returns:
        Σ_n w_n log p(y_n | x_n) / Σ_n w_n T_n.

    Raises:
        DataError: If the batches hold no response token.
    """
    device = input_device(model)
    total = tokens = 0.0
    with evaluating(model):
        for batch in batches:
            batch_on_device = batch.to(device)
            labels = batch_on_device.input_ids[:, 1:][batch_on_device.loss_mask[:, 1:]]
            logits = _response_logits(model, batch_on_device)
            weight = batch_on_device.weight.double().repeat_interleave(batch_on_device.loss_mask.sum(dim=1))
            for rows in torch.arange(len(labels), device=device).split(ROWS_PER_CHUNK):
                log_probability = logits[rows].float().log_softmax(dim=-1)
                picked = log_probability.gather(1, labels[rows, None]).squeeze(1)
                total += float((picked.double() * weight[rows]).sum())
            tokens += float(weight.sum())
    if not tokens:
        raise DataError("The likelihood cannot be measured: no batch holds a response token.")
    return total / tokens


def _response_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits that predict the response tokens, (tokens, vocabulary), sequence after sequence."""
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    # Token t is predicted at position t - 1. Indexing copies, so that the logits of all other positions can be freed.
    return logits[:, :-1][batch.loss_mask[:, 1:]]


def kl_rows(reference: Tensor, merged: Tensor) -> Tensor:
    """Return KL(softmax(reference) ‖ softmax(merged)) of every row, (tokens,) float32, in nats."""
    rows = []
    for p, q in zip(reference.split(ROWS_PER_CHUNK), merged.split(ROWS_PER_CHUNK), strict=True):
        log_p, log_q = p.float().log_softmax(dim=-1), q.float().log_softmax(dim=-1)
        rows.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
    return torch.cat(rows)


# ---- output --------------------------------------------------------------------------------------------------------


def table(evaluations: Iterable[Evaluation]) -> Table:
    """Return a table with one row for each evaluation: shares with their 95 % intervals, KL in nats per token."""
    drawn = Table(title="Evaluation (95 % Wilson intervals)")
    drawn.add_column("method")
    for column in (
        "refusal, harmful ↑",
        "refusal, borderline ↓",
        "refusal, benign ↓",
        "utility ↑",
        "degenerate ↓",
        "KL to reference",
    ):
        drawn.add_column(column, justify="right")
    for evaluation in evaluations:
        rates = (
            evaluation.refusal_harmful,
            evaluation.refusal_borderline,
            evaluation.refusal_benign,
            evaluation.utility_exact_match,
            evaluation.degenerate,
        )
        kl = evaluation.kl_to_reference
        drawn.add_row(
            Text(evaluation.name),
            *("" if rate is None else str(rate) for rate in rates),
            "" if kl is None else f"{kl:.4f}",
        )
    return drawn


def write_json(content: Any, path: Path) -> None:
    """Write JSON to a temporary name and move it into place, so that no half-written file is left.

    Args:
        content: Plain JSON values.
        path: File to write; its folder is made.

    Raises:
        OutputError: If the file cannot be written, or a number is not finite (JSON has no word for it).
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise OutputError(f"{path} cannot be written as JSON: a number is not finite ({error}).") from error
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
