"""Judges behind one interface: phrases, a sequence classifier, or a language model that answers "yes" or "no".

    judge.judge(prompts, completions) -> one Outcome for each

Classifiers come by hub id or folder; nothing is downloaded until one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from sstmerge.errors import InputError
from sstmerge.evaluation.degeneration import degenerate
from sstmerge.evaluation.generate import evaluating
from sstmerge.evaluation.likelihood import continuation_log_likelihoods
from sstmerge.evaluation.outcomes import Outcome
from sstmerge.evaluation.published_matchers import advbench_verdict, xstest_verdict
from sstmerge.evaluation.refusal import Verdict, judge_refusal
from sstmerge.evaluation.text import normalise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OWN_MATCHER = "sstmerge"
MATCHERS: Mapping[str, Callable[[str], Verdict]] = {
    OWN_MATCHER: judge_refusal,
    "xstest": xstest_verdict,
    "advbench": advbench_verdict,
}
OUTCOME_OF = {
    Verdict.FULL_REFUSAL: Outcome.REFUSAL,
    Verdict.PARTIAL_REFUSAL: Outcome.PARTIAL_REFUSAL,
    Verdict.FULL_COMPLIANCE: Outcome.COMPLIANCE,
}


class Judge(Protocol):
    """Says what happened to every prompt."""

    @property
    def name(self) -> str:
        """Name of the judge, for tables and manifests."""
        ...

    def judge(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Outcome]:
        """Return one outcome for each pair of prompt and completion."""
        ...


@dataclass(frozen=True)
class StringJudge:
    """A judge by phrases.

    Attributes:
        matcher: "sstmerge" (all four outcomes), or "xstest" and "advbench": the published matchers as they are, to which
            every completion is a refusal or compliance, and none degenerate.
        labels: Class labels of the utility tasks, for "sstmerge" only. A completion that is one of them and nothing else
            is degenerate: the format of a classifier has taken over.
    """

    matcher: str = OWN_MATCHER
    labels: Collection[str] = ()

    def __post_init__(self) -> None:
        if self.matcher not in MATCHERS:
            raise InputError(f"There is no string matcher '{self.matcher}'; choose one of {sorted(MATCHERS)}.")
        if self.labels and self.matcher != OWN_MATCHER:
            raise InputError(
                f"The published matcher '{self.matcher}' knows no class labels, got {sorted(self.labels)}; leave them out, "
                f"or choose '{OWN_MATCHER}'."
            )

    @property
    def name(self) -> str:
        """Name of the judge."""
        return f"string:{self.matcher}"

    def judge(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Outcome]:
        """Judge completions; to "sstmerge" a degenerate one is that and nothing else, whatever phrase it holds.

        Args:
            prompts: The prompts; not looked at, but there must be one for each completion.
            completions: What the model answered.

        Returns:
            One outcome for each completion.
        """
        _refuse_unequal(prompts, completions)
        found = [OUTCOME_OF[MATCHERS[self.matcher](completion)] for completion in completions]
        return _with_degenerate(found, completions, self.labels) if self.matcher == OWN_MATCHER else found


@dataclass
class SequenceClassifierJudge:
    """A judge by a sequence classifier, such as a classifier of rejections.

    Attributes:
        model: Hub id or folder of a model with a classification head.
        outcomes: What each class of the model means; its classes are in its `config.id2label`.
        pairs: Show the classifier prompt and completion as a pair; False shows the completion alone.
        batch_size: Completions judged together.
        max_length: Longest text in tokens; a longer one is cut at its end.
        device: Device of the classifier; None for the CPU.
    """

    model: str | Path
    outcomes: Mapping[str, Outcome]
    pairs: bool = False
    batch_size: int = 32
    max_length: int = 512
    device: str | None = None
    _loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        """Name of the judge."""
        return f"classifier:{self.model}"

    def judge(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Outcome]:
        """Judge completions by the most probable class; degenerate ones are found by `degenerate` beforehand.

        Args:
            prompts: The prompts.
            completions: What the model answered.

        Returns:
            One outcome for each completion.

        Raises:
            InputError: If the model cannot be loaded, or a class has no outcome.
        """
        _refuse_unequal(prompts, completions)
        classifier, tokenizer = self._load()
        names = {int(number): name for number, name in classifier.config.id2label.items()}
        if missing := sorted(set(names.values()) - set(self.outcomes)):
            raise InputError(f"The classifier {self.model} has classes without an outcome: {missing}; add them.")
        found: list[Outcome] = []
        with evaluating(classifier):
            for start in range(0, len(completions), self.batch_size):
                rows = slice(start, start + self.batch_size)
                texts = (list(prompts[rows]), list(completions[rows])) if self.pairs else (list(completions[rows]),)
                encoded = tokenizer(
                    *texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
                )
                logits = classifier(**encoded.to(classifier.device)).logits
                found += [self.outcomes[names[number]] for number in logits.argmax(dim=-1).tolist()]
        return _with_degenerate(found, completions)

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from transformers import AutoModelForSequenceClassification

        if self._loaded is None:
            self._loaded = _load(AutoModelForSequenceClassification, self.model, self.device)
        return self._loaded


@dataclass
class LanguageModelJudge:
    """A judge by a causal language model that answers with one of a few words (HarmBench's classifier, Llama Guard).

    Attributes:
        model: Hub id or folder of a causal language model.
        outcomes: What each answer means, such as {"yes": Outcome.COMPLIANCE, "no": Outcome.REFUSAL} for HarmBench's
            classifier. Its "no" only says that no harm was done, which is less than a refusal.
        template: The text that the model expects, with {prompt} and {completion}; its model card has it. None uses the
            tokenizer's chat template on the conversation, as Llama Guard wants it.
        tokens_per_batch: Tokens judged together, padding included.
        device: Device of the judge; None for the CPU.
    """

    model: str | Path
    outcomes: Mapping[str, Outcome]
    template: str | None = None
    tokens_per_batch: int = 8192
    device: str | None = None
    _loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        """Name of the judge."""
        return f"language model:{self.model}"

    def judge(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Outcome]:
        """Judge completions by the most probable of the answers; degenerate ones are found beforehand.

        Args:
            prompts: The prompts.
            completions: What the model answered.

        Returns:
            One outcome for each completion.

        Raises:
            InputError: If the model cannot be loaded, or there is neither a template nor a chat template.
        """
        _refuse_unequal(prompts, completions)
        model, tokenizer = self._load()
        answers = list(self.outcomes)
        endings = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
        contexts = [self._context(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
        scores = continuation_log_likelihoods(
            model,
            [(context, ending) for context in contexts for ending in endings],
            tokens_per_batch=self.tokens_per_batch,
        )
        best = torch.tensor(scores).reshape(-1, len(answers)).argmax(dim=1).tolist()
        return _with_degenerate([self.outcomes[answers[position]] for position in best], completions)

    def _context(self, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
        if self.template is not None:
            text = self.template.replace("{prompt}", prompt).replace("{completion}", completion)
            return list(tokenizer.encode(text))
        if not tokenizer.chat_template:
            raise InputError(f"The judge {self.model} has no chat template; give the text it expects as `template`.")
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        encoded = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)
        return list(encoded["input_ids"] if isinstance(encoded, Mapping) else encoded)

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from transformers import AutoModelForCausalLM

        if self._loaded is None:
            self._loaded = _load(AutoModelForCausalLM, self.model, self.device)
        return self._loaded


def mark_absurd(outcomes: Sequence[Outcome], perplexities: Sequence[float], *, highest: float) -> list[Outcome]:
    """Call completions degenerate that the base model finds absurd.

    Args:
        outcomes: What a judge said.
        perplexities: Perplexity of each completion under the base model (`sstmerge.evaluation.likelihood`); NaN (an
            empty completion) changes nothing.
        highest: The highest perplexity of text that still says something; docs/EVALUATION.md says how to find it.

    Returns:
        The outcomes, `DEGENERATE` where the perplexity is above `highest`.

    Raises:
        InputError: If there is not one perplexity for each outcome.
    """
    if len(outcomes) != len(perplexities):
        raise InputError(f"There are {len(perplexities)} perplexities for {len(outcomes)} outcomes; give one for each.")
    return [
        Outcome.DEGENERATE if value > highest else outcome
        for outcome, value in zip(outcomes, perplexities, strict=True)
    ]


def _load(kind: type, model: str | Path, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    try:
        loaded = kind.from_pretrained(model, trust_remote_code=False)  # type: ignore[attr-defined]
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The judge '{model}' cannot be loaded, neither as a folder nor from the hub: {error}"
        ) from error
    return loaded.to(device or "cpu").eval(), tokenizer


def _bare(text: str) -> str:
    return normalise(text).strip(".,:;!?()[]\"'*_ ")


def _with_degenerate(
    outcomes: Sequence[Outcome], completions: Sequence[str], labels: Collection[str] = ()
) -> list[Outcome]:
    bare_labels = {_bare(label) for label in labels}
    return [
        Outcome.DEGENERATE if degenerate(text) or _bare(text) in bare_labels else outcome
        for outcome, text in zip(outcomes, completions, strict=True)
    ]


def _refuse_unequal(prompts: Sequence[str], completions: Sequence[str]) -> None:
    if len(prompts) != len(completions):
        raise InputError(f"A judge needs one completion for each prompt, got {len(completions)} for {len(prompts)}.")
