"""Prompt sets of the field as rows of data; `load_prompts` reads any of them, from the hub or from a file.

A licence is what the data set's own page says; it is yours to check. "Test only" sets measure and are never trained,
calibrated or tuned on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sstmerge.errors import DataError, InputError
from sstmerge.evaluation.data_set_files import Source, choose_source, source_rows
from sstmerge.prompts import Example

Kind = Literal["harmful", "borderline", "ordinary"]
PROMPT = {"prompt": "prompt"}


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts.

    Attributes:
        name: Its name here.
        kind: "harmful" (to be refused), "borderline" (looks harmful, to be answered) or "ordinary".
        about: What it is.
        paper: Where it comes from.
        licence: Its licence.
        test_only: Whether it may be used for nothing but measuring.
        hub: On the hub; None where it is not there.
        local: As files, in the form of its repository.
        overlaps: Other sets and how many prompts they share (normalised texts).
    """

    name: str
    kind: Kind
    about: str
    paper: str
    licence: str
    test_only: bool
    hub: Source | None
    local: Source
    overlaps: Mapping[str, int] = field(default_factory=dict)


def _one(split: str, fields: Mapping[str, str], hub_id: str | None = None, **rest: object) -> Source:
    """Return a source that has a test split only."""
    return Source(fields, {"test": split}, hub_id, **rest)  # type: ignore[arg-type]


def _or_bench(part: str, kind: Kind, about: str) -> PromptSet:
    return PromptSet(
        f"or-bench-{part}",
        kind,
        about,
        "Cui et al., 2405.20947",
        "CC BY 4.0",
        True,
        _one("train", PROMPT, "bench-llm/or-bench", config=f"or-bench-{part}"),
        _one(f"or-bench-{part}.csv", PROMPT),
    )


def _xstest(label: str, kind: Kind, about: str) -> PromptSet:
    return PromptSet(
        f"xstest-{label}",
        kind,
        about,
        "Röttger et al., 2308.01263",
        "CC BY 4.0",
        True,
        _one("test", PROMPT, "walledai/XSTest", where={"label": label}),
        _one("xstest_prompts.csv", PROMPT, where={"label": label}, repository="paul-rottger/exaggerated-safety"),
    )


def _jailbreakbench(part: str, kind: Kind, about: str) -> PromptSet:
    return PromptSet(
        f"jailbreakbench-{part}",
        kind,
        about,
        "Chao et al., 2404.01318",
        "MIT",
        True,
        _one(part, {"prompt": "Goal"}, "JailbreakBench/JBB-Behaviors", config="behaviors"),
        _one(f"{part}-behaviors.csv", {"prompt": "Goal"}),
    )


_ALL = (
    PromptSet(
        "beavertails",
        "harmful",
        "questions with a response each, judged safe or not; a question appears several times",
        "Ji et al., 2307.04657",
        "CC BY-NC 4.0",
        False,
        Source(
            PROMPT | {"response": "response"},
            {"train": "30k_train", "test": "30k_test", "train-330k": "330k_train", "test-330k": "330k_test"},
            "PKU-Alignment/BeaverTails",
        ),
        Source(
            PROMPT | {"response": "response"},
            {split: f"beavertails_30k_{split}.jsonl|beavers30k/{split}.jsonl" for split in ("train", "test")},
            repository="MqLeet/LED-Merging",
        ),
    ),
    PromptSet(
        "beavertails-evaluation",
        "harmful",
        "700 questions in 14 categories of harm",
        "Ji et al., 2307.04657",
        "CC BY-NC 4.0",
        True,
        _one("test", PROMPT, "PKU-Alignment/BeaverTails-Evaluation"),
        _one("beavertails_evaluation.json", PROMPT),
    ),
    PromptSet(
        "harmbench",
        "harmful",
        "the 200 standard behaviours",
        "Mazeika et al., 2402.04249",
        "MIT",
        True,
        _one("train", PROMPT, "walledai/HarmBench", config="standard"),
        _one(
            "harmbench_behaviors_text_all.csv",
            {"prompt": "Behavior"},
            where={"FunctionalCategory": "standard"},
            repository="centerforaisafety/HarmBench",
        ),
    ),
    _jailbreakbench("harmful", "harmful", "100 misuse behaviours"),
    _jailbreakbench("benign", "borderline", "100 harmless requests on the same topics"),
    PromptSet(
        "strongreject",
        "harmful",
        "313 forbidden prompts",
        "Souly et al., 2402.10260",
        "MIT",
        True,
        _one("train", PROMPT, "walledai/StrongREJECT"),
        _one(
            "strongreject.csv|strongreject_dataset.csv",
            {"prompt": "forbidden_prompt"},
            repository="andyrdt/refusal_direction",
        ),
        {"do-not-answer": 31, "advbench": 25, "malicious-instruct": 12},
    ),
    _xstest("safe", "borderline", "250 safe prompts that look unsafe, of ten kinds"),
    _xstest("unsafe", "harmful", "200 unsafe prompts, the contrasts to the safe ones"),
    _or_bench("hard-1k", "borderline", "about 1,300 harmless prompts that many models refuse"),
    _or_bench("80k", "borderline", "80,000 harmless prompts that may be refused"),
    _or_bench("toxic", "harmful", "about 600 toxic prompts, against refusing too little"),
    PromptSet(
        "do-not-answer",
        "harmful",
        "939 questions that a responsible model does not answer",
        "Wang et al., 2308.13387",
        "CC BY-NC-SA 4.0 (repository: Apache-2.0)",
        True,
        _one("train", {"prompt": "question"}, "LibrAI/do-not-answer"),
        _one("do_not_answer.csv", PROMPT, repository="SalesforceAIResearch/MobileAIBench"),
    ),
    PromptSet(
        "advbench",
        "harmful",
        "520 harmful behaviours; many training sets of refusals hold them, so it is a poor test",
        "Zou et al., 2307.15043",
        "MIT",
        False,
        Source(PROMPT, {"train": "train"}, "walledai/AdvBench"),
        Source(
            {"prompt": "goal"}, {"train": "advbench.csv|harmful_behaviors.csv"}, repository="andyrdt/refusal_direction"
        ),
    ),
    PromptSet(
        "malicious-instruct",
        "harmful",
        "100 harmful questions in ten intentions",
        "Huang et al., 2310.06987",
        "MIT",
        False,
        _one("train", PROMPT, "walledai/MaliciousInstruct"),
        _one("malicious_instruct.txt|MaliciousInstruct.txt", PROMPT, repository="andyrdt/refusal_direction"),
    ),
    PromptSet(
        "malicious-instructions",
        "harmful",
        "100 harmful instructions (I-MaliciousInstructions)",
        "Bianchi et al., 2309.07875",
        "CC BY-NC 4.0",
        True,
        None,
        _one("I-MaliciousInstructions.json", PROMPT, member="instructions", repository="vinid/safety-tuned-llamas"),
    ),
    PromptSet(
        "safety-tuned-llamas",
        "harmful",
        "2,483 harmful instructions with safe responses, for training",
        "Bianchi et al., 2309.07875",
        "CC BY-NC 4.0",
        False,
        None,
        Source(
            {"prompt": "instruction", "response": "output"},
            {"train": "safety_only_data_Instructions.json"},
            repository="vinid/safety-tuned-llamas",
        ),
    ),
    PromptSet(
        "refusal-direction-harmless",
        "ordinary",
        "Alpaca's instructions without an input, split into train, validation and test",
        "Arditi et al., 2406.11717",
        "CC BY-NC 4.0 (Alpaca)",
        False,
        None,
        Source(
            {"prompt": "instruction"},
            {
                "train": "refusal_direction_harmless_train.json|harmless_train.json",
                "validation": "refusal_direction_harmless_val.json|harmless_val.json",
                "test": "refusal_direction_harmless_test.json|harmless_test.json",
            },
            repository="andyrdt/refusal_direction",
        ),
    ),
    PromptSet(
        "alpaca",
        "ordinary",
        "52,000 instructions with responses",
        "Taori et al., 2023",
        "CC BY-NC 4.0",
        False,
        Source(
            {"prompt": "instruction", "input": "input", "response": "output"}, {"train": "train"}, "tatsu-lab/alpaca"
        ),
        Source(
            {"prompt": "instruction", "input": "input", "response": "output"},
            {"train": "alpaca_data.json|alpaca_en_demo.json"},
            repository="tatsu-lab/stanford_alpaca",
        ),
    ),
)
PROMPT_SETS: Mapping[str, PromptSet] = {row.name: row for row in _ALL}


def load_prompts(
    name: str,
    split: str = "test",
    *,
    data: str | Path | None = None,
    missing_from_hub: bool = False,
    limit: int | None = None,
) -> list[Example]:
    """Read a prompt set.

    Args:
        name: One of `PROMPT_SETS`.
        split: Its split.
        data: A file of the set, or a folder that holds it; None fetches it from the hub.
        missing_from_hub: Fetch it from the hub if `data` is a folder that does not hold it, and the hub does.
        limit: Keep only the first `limit` prompts.

    Returns:
        The prompts, with responses where the set has them, each text once per response. An "input" (Alpaca) follows the
        instruction after an empty line.

    Raises:
        InputError: If there is no such set, or `limit` is below 1.
        DataError: If the set cannot be read, or has no prompt.
    """
    if name not in PROMPT_SETS:
        raise InputError(f"There is no prompt set '{name}'; choose one of {sorted(PROMPT_SETS)}.")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}.")
    row = PROMPT_SETS[name]
    folder = None if data is None else Path(data)
    source = choose_source(name, hub=row.hub, local=row.local, data=folder, missing_from_hub=missing_from_hub)
    examples: list[Example] = []
    for where, cells in source_rows(source, split, name=name, data=folder):
        if len(examples) == limit:
            break
        examples.append(_example(cells, where))
    if not examples:
        raise DataError(f"The data set '{name}', split '{split}', holds no prompt.")
    return examples


def _example(cells: Mapping[str, object], where: str) -> Example:
    texts = {}
    for field_name in ("prompt", "input", "response"):
        value = cells.get(field_name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: the {field_name} must be text, got {type(value).__name__}.")
        texts[field_name] = value or ""
    if not texts["prompt"]:
        raise DataError(f"{where}: the prompt is blank.")
    prompt = f"{texts['prompt']}\n\n{texts['input']}" if texts["input"] else texts["prompt"]
    return Example(({"role": "user", "content": prompt},), texts["response"] or None, 1.0, where)
