"""Answers of the reference model to prompts without a response: shared among processes, kept when a run is stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sstmerge.atomic import atomic_file
from sstmerge.errors import DataError
from sstmerge.evaluation.generate import generate
from sstmerge.fisher.fingerprints import model_fingerprint
from sstmerge.pipeline.run import Run
from sstmerge.prompts import Example, prompt_tokens

# Prompts decoded together. Half-precision answers may depend on which prompts these are, so the number is fixed.
_PROMPTS_PER_BATCH = 64


def answer(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    run: Run,
    *,
    point: str,
    max_new_tokens: int,
    progress: Callable[[int, int], None],
) -> list[str]:
    """Answer prompts greedily, a batch at a time; batches that an earlier start of the run has answered are not repeated.

    Args:
        model: The model, with whatever adapters are to answer.
        tokenizer: Its tokenizer.
        examples: The prompts.
        run: The run.
        point: What tells this model from the base model, such as the reference and the adapters.
        max_new_tokens: Longest answer.
        progress: Called with the number of prompts answered, by all processes, and in all.

    Returns:
        One answer for each prompt.
    """
    lengths = [len(prompt_tokens(example, tokenizer)) for example in examples]
    order = sorted(range(len(examples)), key=lambda position: -lengths[position])
    groups = [order[start : start + _PROMPTS_PER_BATCH] for start in range(0, len(order), _PROMPTS_PER_BATCH)]
    texts = [[dict(message) for message in example.messages] for example in examples]
    key = hashlib.sha256(json.dumps([texts, point, model_fingerprint(model), max_new_tokens]).encode()).hexdigest()[:16]
    known, own = _of_all(run, _kept(run, key)), dict[int, list[str]]()
    count = run.ranks.counter()
    before = sum(len(groups[number]) for number in known)
    for number, group in enumerate(groups):
        if number in known or number % run.ranks.size != run.ranks.rank:
            continue
        own[number] = generate(
            model,
            tokenizer,
            [examples[position] for position in group],
            max_new_tokens=max_new_tokens,
            batch_size=_PROMPTS_PER_BATCH,
        )
        _keep(run, key, own)
        run.ranks.check()
        progress(before + count(len(group)), len(examples))
    known |= _of_all(run, own)
    answers = [""] * len(examples)
    for number, group in enumerate(groups):
        for position, text in zip(group, known[number], strict=True):
            answers[position] = text
    return answers


def _of_all(run: Run, answers: dict[int, list[str]]) -> dict[int, list[str]]:
    """Return what all processes have."""
    parts = [json.loads(part) for part in run.ranks.exchange(json.dumps(list(answers.items())))]
    return {number: texts for part in parts for number, texts in part}


def _kept(run: Run, key: str, process: str = "*") -> dict[int, list[str]]:
    """Return the batches answered by earlier starts, as far as this process can see."""
    kept: dict[int, list[str]] = {}
    for path in sorted(run.folder.glob(f"answers-{key}-{process}.json")) if run.folder is not None else []:
        try:
            content = json.loads(path.read_text())
            if _hash(content["answers"]) != content["sha256"]:
                raise ValueError("its contents do not match its hash")
            kept |= {int(number): [str(text) for text in texts] for number, texts in content["answers"]}
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise DataError(f"The answers in '{path}' are damaged: {error}. Start anew with --restart.") from error
    return kept


def _keep(run: Run, key: str, answers: dict[int, list[str]]) -> None:
    """Keep what this process has answered, beside what an earlier start has left under the same name."""
    if run.folder is None:
        return
    merged = _kept(run, key, str(run.ranks.rank)) | answers
    with atomic_file(run.folder / f"answers-{key}-{run.ranks.rank}.json") as temporary:
        temporary.write_text(json.dumps({"answers": list(merged.items()), "sha256": _hash(list(merged.items()))}))


def _hash(answers: Any) -> str:
    return hashlib.sha256(json.dumps(answers).encode()).hexdigest()
