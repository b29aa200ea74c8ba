"""Checks before a merge: are the data and the adapters fit for it?

The two Fishers know only what the prompts show them. What goes wrong most often is in the data: benign prompts of which
the safety adapter refuses none (then nothing protects the borderline ones), one refusal repeated in every row, prompts
that are in both sets, adapters that answer everything with a label.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from sstmerge.errors import DataError
from sstmerge.evaluation.rates import Rate
from sstmerge.evaluation.refusal import refuses
from sstmerge.evaluation.text import normalise
from sstmerge.prompts import Example

Severity = Literal["ok", "warning", "error"]

NEAR_DUPLICATE = 0.8
"""Jaccard index of the words from which two texts count as nearly the same."""
MOST_REFUSALS_ALIKE = 0.5
FEW_REFUSALS = 0.5
MANY_LABELS = 0.2
LABEL_WORDS = 3
EXAMPLES_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        check: Short name of the check.
        severity: "ok", "warning" (the merge will be worse than it could be) or "error" (it will not mean anything).
        sentence: What was found, and what to do about it.
        numbers: The figures behind it.
    """

    check: str
    severity: Severity
    sentence: str
    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class CheckReport:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def severity(self) -> Severity:
        """The worst severity among the findings."""
        found = {finding.severity for finding in self.findings}
        return "error" if "error" in found else "warning" if "warning" in found else "ok"

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {"severity": self.severity, "findings": [asdict(finding) for finding in self.findings]}

    def table(self) -> Table:
        """Return the findings as a table."""
        drawn = Table(title="Check before the merge")
        for column in ("check", "severity", "finding"):
            drawn.add_column(column)
        colours = {"ok": "green", "warning": "yellow", "error": "red"}
        for finding in self.findings:
            # Text, because prompts and names may hold what rich would take for markup.
            drawn.add_row(
                Text(finding.check), Text(finding.severity, style=colours[finding.severity]), Text(finding.sentence)
            )
        return drawn


def check(
    harm: Sequence[Example],
    benign: Sequence[Example],
    *,
    safety: str,
    utilities: Sequence[str],
    generate_with: Callable[[str, Sequence[Example]], list[str]],
) -> CheckReport:
    """Check data and adapters before a merge.

    Args:
        harm: Harmful prompts with their refusals.
        benign: Benign prompts.
        safety: Name of the safety adapter.
        utilities: Names of the utility adapters.
        generate_with: Answers the examples with the adapter of that name, one completion each, in order. It is called
            once for each adapter and each of the two sets.

    Returns:
        The report.

    Raises:
        DataError: If one of the two sets is empty.
    """
    if not harm or not benign:
        raise DataError(f"A check needs harmful and benign prompts, got {len(harm)} and {len(benign)}.")
    answers = {name: (generate_with(name, harm), generate_with(name, benign)) for name in (safety, *utilities)}
    on_harm, on_benign = answers[safety]
    return CheckReport(
        (
            check_over_refusal(safety, on_benign),
            check_safety(safety, on_harm),
            check_refusals([example.response for example in harm]),
            check_overlap(harm, benign),
            *(check_labels(name, [*of_harm, *of_benign]) for name, (of_harm, of_benign) in answers.items()),
        )
    )


def check_over_refusal(safety: str, completions: Sequence[str]) -> Finding:
    """Does the safety adapter refuse benign prompts, and does the benign set hold any that it refuses?"""
    rate = Rate(sum(map(refuses, completions)), len(completions))
    if rate.count == 0:
        return Finding(
            "over-refusal",
            "warning",
            f"The safety adapter {safety!r} refuses none of the {rate.total} benign prompts. If it never over-refuses, "
            "all is well; if it does elsewhere, F_cost cannot protect what it has not seen: add borderline prompts "
            "(harmless ones that look harmful) to the benign set.",
            rate.to_json(),
        )
    return Finding(
        "over-refusal",
        "ok",
        f"The safety adapter {safety!r} refuses {rate.count} of {rate.total} benign prompts ({rate}): the benign set "
        "shows what the merge has to avoid.",
        rate.to_json(),
    )


def check_safety(safety: str, completions: Sequence[str]) -> Finding:
    """Does the safety adapter refuse the harmful prompts?"""
    rate = Rate(sum(map(refuses, completions)), len(completions))
    sentence = f"The safety adapter {safety!r} refuses {rate.count} of {rate.total} harmful prompts ({rate})."
    if rate.value >= FEW_REFUSALS:
        return Finding("safety", "ok", sentence, rate.to_json())
    advice = " A merge cannot refuse what its safety adapter answers: is it the right adapter, and the right file?"
    return Finding("safety", "error" if rate.count == 0 else "warning", sentence + advice, rate.to_json())


def check_refusals(responses: Sequence[str | None]) -> Finding:
    """Are the responses to the harmful prompts refusals, and are they more than one sentence repeated?"""
    given = [normalise(response) for response in responses if response is not None]
    if not given:
        return Finding(
            "refusals", "error", "The harmful prompts have no responses; F_gain needs the refusals.", {"responses": 0}
        )
    (common, count), *_ = Counter(given).most_common(1)
    near = sum(_jaccard(_words(common), _words(response)) >= NEAR_DUPLICATE for response in given)
    refusals = Rate(sum(map(refuses, given)), len(given))
    numbers = {
        "responses": len(given),
        "distinct": len(set(given)),
        "most_common_share": count / len(given),
        "near_most_common_share": near / len(given),
        "refusal_share": refusals.value,
    }
    if refusals.value < FEW_REFUSALS:
        return Finding(
            "refusals",
            "error" if refusals.count == 0 else "warning",
            f"Only {refusals.count} of {refusals.total} responses to harmful prompts are refusals; "
            "is it the right file?",
            numbers,
        )
    if near / len(given) > MOST_REFUSALS_ALIKE and len(given) > 1:
        return Finding(
            "refusals",
            "warning",
            f'{near} of {len(given)} refusals are "{common[:60]}" or nearly so: F_gain then measures this wording, not '
            "refusing; vary the refusals.",
            numbers,
        )
    different = f"{len(set(given))} different responses among {len(given)}"
    return Finding("refusals", "ok", f"{different}; {refusals.count} of the {refusals.total} are refusals.", numbers)


def check_overlap(harm: Sequence[Example], benign: Sequence[Example]) -> Finding:
    """Are there prompts that are in both sets, or nearly so?"""
    benign_texts = [normalise(example.prompt) for example in benign]
    at = {text: position for position, text in enumerate(benign_texts)}
    same: list[str] = []
    near: list[str] = []
    close = _NearDuplicates([_words(text) for text in benign_texts])
    for example in harm:
        text = normalise(example.prompt)
        if text in at:
            same.append(f"{example.source} = {benign[at[text]].source}")
        elif (position := next(close.of(_words(text)), None)) is not None:
            near.append(f"{example.source} ≈ {benign[position].source}")
    numbers = {"identical": len(same), "near_duplicates": len(near), "pairs": [*same, *near]}
    shown = "; ".join([*same, *near][:EXAMPLES_SHOWN])
    if same:
        sentence = (
            f"{len(same)} prompts are harmful and benign at once, {len(near)} more nearly so ({shown}): "
            "the two Fishers would contradict each other; remove them from one file."
        )
        return Finding("overlap", "error", sentence, numbers)
    if near:
        sentence = f"{len(near)} harmful prompts have a near duplicate among the benign ones ({shown}): is that meant?"
        return Finding("overlap", "warning", sentence, numbers)
    return Finding("overlap", "ok", "No prompt is in both sets.", numbers)


def check_labels(adapter: str, completions: Sequence[str]) -> Finding:
    """Does an adapter answer with a label whatever it is asked?"""
    short = Counter(text for text in map(normalise, completions) if len(text.split()) <= LABEL_WORDS)
    repeated = {text: count for text, count in short.items() if count > 1}
    rate = Rate(sum(repeated.values()), len(completions))
    numbers = rate.to_json() | {"answers": dict(Counter(repeated).most_common(EXAMPLES_SHOWN))}
    if rate.value >= MANY_LABELS:
        shown = ", ".join(f'"{text}" × {count}' for text, count in Counter(repeated).most_common(EXAMPLES_SHOWN))
        sentence = (
            f"The adapter {adapter!r} gives one of a few short answers to {rate.count} of {rate.total} prompts "
            f"({shown}): a merge can take over this format and answer harmful prompts with labels; train it with some "
            "general chat."
        )
        return Finding(f"labels of {adapter}", "warning", sentence, numbers)
    sentence = f"The adapter {adapter!r} answers in its own words ({rate.count} of {rate.total} short and repeated)."
    return Finding(f"labels of {adapter}", "ok", sentence, numbers)


def _words(text: str) -> frozenset[str]:
    return frozenset("".join(c if c.isalnum() or c == "'" else " " for c in text).split())


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    union = len(one | other)
    return len(one & other) / union if union else 1.0


class _NearDuplicates:
    """Finds the word sets whose Jaccard index with a given one is `NEAR_DUPLICATE` or more."""

    def __init__(self, sets: Sequence[frozenset[str]]) -> None:
        self._sets = sets
        self._with_word: dict[str, list[int]] = defaultdict(list)
        for position, words in enumerate(sets):
            for word in words:
                self._with_word[word].append(position)

    def of(self, words: frozenset[str]) -> Iterator[int]:
        # Only sets that share a word can be near; the others are never compared.
        shared = Counter(position for word in words for position in self._with_word.get(word, ()))
        for position, count in sorted(shared.items()):
            if count >= NEAR_DUPLICATE * (len(words) + len(self._sets[position]) - count):
                yield position
