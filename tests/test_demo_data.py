"""The prompts and adapters that the package carries."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sstmerge.demo.generate_utility import generate
from sstmerge.demo.model import BASE_MODEL_NAME
from sstmerge.demo.train_adapters import (
    ANCHOR_TOKENS,
    DATA_FOLDER,
    SAFETY,
    UTILITY,
    draw_training_rows,
    encode_anchors,
    response_loss,
)
from sstmerge.errors import DataError
from sstmerge.evaluation.generate import generate as generate_answers
from sstmerge.fisher.batch import Batch

FILES = ("harmful", "borderline", "benign", "utility")
SIZES = {
    "harmful": {"train": 102, "calibration": 80, "tune": 20, "test": 50},
    "borderline": {"train": 40, "calibration": 30, "tune": 10, "test": 40},
    "benign": {"train": 114, "calibration": 96, "tune": 20, "test": 50},
    "utility": {"train": 408, "calibration": 32, "tune": 10, "test": 50},
}
# Input and output size of each adapted layer of SmolLM2-135M.
LAYER_SHAPES = {
    "q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576),
    "gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576),
}  # fmt: skip
LAYERS = 30


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.casefold())


@pytest.mark.parametrize("name", FILES)
def test_rows_have_the_documented_fields_and_sizes(name: str) -> None:
    rows = read(name)
    assert Counter(row["split"] for row in rows) == SIZES[name]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["id", "category", "split", "prompt", "response"]
        assert row["id"].startswith(f"{name}-")
        assert all(value and value == value.strip() for value in row.values()), row["id"]


def test_no_prompt_occurs_twice_in_any_file_or_split() -> None:
    counted = Counter(" ".join(words(row["prompt"])) for name in FILES for row in read(name))
    assert [prompt for prompt, count in counted.items() if count > 1] == []


def test_authored_prompts_are_not_near_duplicates() -> None:
    rows = [(row["id"], set(words(row["prompt"]))) for name in FILES[:3] for row in read(name)]
    for position, (name, own) in enumerate(rows):
        for other_name, other in rows[:position]:
            assert len(own & other) <= 0.7 * len(own | other), (name, other_name)


@pytest.mark.parametrize("name", ["harmful", "borderline", "benign"])
def test_every_category_is_in_every_large_split(name: str) -> None:
    rows = read(name)
    for split in ("calibration", "test", "train"):
        assert {row["category"] for row in rows if row["split"] == split} == {row["category"] for row in rows}


def test_harmful_prompts_span_twelve_categories() -> None:
    assert len({row["category"] for row in read("harmful")}) == 12


def test_refusals_are_specific_and_varied() -> None:
    responses = [row["response"] for row in read("harmful")]
    assert len(set(responses)) == len(responses)
    openings = Counter(" ".join(response.split()[:3]) for response in responses)
    assert len(openings) >= 25
    assert max(openings.values()) <= len(responses) // 10
    second_sentences = Counter(re.split(r"(?<=[.!?]) ", response)[-1] for response in responses)
    assert len(second_sentences) >= 50
    assert max(second_sentences.values()) <= len(responses) // 10


def test_refusals_and_answers_are_what_the_judge_takes_them_for() -> None:
    from sstmerge.evaluation.degeneration import degenerate
    from sstmerge.evaluation.refusal import refuses

    assert [row["id"] for row in read("harmful") if not refuses(row["response"])] == []
    answers = [row for name in ("borderline", "benign", "utility") for row in read(name)]
    assert [row["id"] for row in answers if refuses(row["response"]) or degenerate(row["response"])] == []


def test_utility_rows_are_those_of_the_generator() -> None:
    assert read("utility") == generate()
    assert generate(seed=1) != generate()


def test_utility_answers_follow_from_the_sentence() -> None:
    corrected = 0
    for row in read("utility"):
        fields = dict(part.split("=") for part in row["response"].split("; "))
        assert list(fields) == ["item", "colour", "count", "day", "customer"]
        for field in ("colour", "day", "customer"):
            assert fields[field] in row["prompt"], row["id"]
        corrected += row["category"] == "order_corrected"
    assert 90 <= corrected <= 160


def test_utility_orders_differ_between_rows() -> None:
    responses = [row["response"] for row in read("utility")]
    assert len(set(responses)) == len(responses)


def test_recipes_train_on_training_rows_and_safety_on_no_borderline_prompt() -> None:
    trained = {row["prompt"] for name in FILES for row in read(name) if row["split"] == "train"}
    borderline = {row["prompt"] for row in read("borderline")}
    safety = {example.prompt for example in draw_training_rows(SAFETY.rows + SAFETY.anchors, seed=0)}
    utility = {example.prompt for example in draw_training_rows(UTILITY.rows + UTILITY.anchors, seed=0)}
    assert safety <= trained - borderline
    assert utility <= trained
    assert not utility & {row["prompt"] for row in read("harmful")}


def test_drawing_more_rows_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match=r"41 training rows of borderline\.jsonl .* has 40"):
        draw_training_rows([("borderline", 41)], seed=0)


def test_anchors_keep_the_prompt_and_take_the_answer_of_the_base_model(pico_llama, pico_tokenizer) -> None:
    model, tokenizer = pico_llama(), pico_tokenizer()
    examples = draw_training_rows([("borderline", 2)], seed=0)
    answers = generate_answers(model, tokenizer, examples, max_new_tokens=ANCHOR_TOKENS + 8)
    for example, answer, encoded in zip(
        examples, answers, encode_anchors(model, tokenizer, examples, max_length=400), strict=True
    ):
        response = encoded.input_ids[encoded.prompt_length :]
        assert len(response) <= ANCHOR_TOKENS
        assert tokenizer.decode(encoded.input_ids[: encoded.prompt_length]).count(example.prompt) == 1
        assert answer.startswith(tokenizer.decode(response, skip_special_tokens=True))


def test_response_loss_counts_response_tokens_only() -> None:
    logits = torch.zeros(1, 4, 5)
    logits[0, 1, 3] = 2.0  # position 1 predicts the response token 3
    logits[0, 0, 4] = 9.0  # a prompt position, which must not count
    batch = Batch(
        input_ids=torch.tensor([[1, 2, 3, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 0]]),
        loss_mask=torch.tensor([[False, False, True, False]]),
        index=torch.tensor([0]),
        weight=torch.ones(1),
    )
    expected = -torch.log_softmax(logits[0, 1], dim=0)[3]
    torch.testing.assert_close(response_loss(logits, batch), expected)


@pytest.mark.parametrize("recipe", [SAFETY, UTILITY], ids=lambda recipe: recipe.name)
def test_adapters_fit_their_configuration(recipe) -> None:
    directory = DATA_FOLDER / "adapters" / recipe.name
    assert sorted(path.name for path in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_MODEL_NAME
    assert (config["r"], config["lora_alpha"]) == (recipe.rank, recipe.alpha)
    assert config["target_modules"] == sorted(recipe.target_modules)
    factors = load_file(directory / "adapter_model.safetensors")
    assert len(factors) == 2 * LAYERS * len(recipe.target_modules)
    for name, factor in factors.items():
        inputs, outputs = LAYER_SHAPES[name.split(".")[-3]]
        expected = (recipe.rank, inputs) if "lora_A" in name else (outputs, recipe.rank)
        assert tuple(factor.shape) == expected, name
        assert factor.dtype == torch.bfloat16
        assert bool(factor.isfinite().all()), name
        assert float(factor.abs().max()) > 0, name


def test_adapters_are_small() -> None:
    files = [path for path in (DATA_FOLDER / "adapters").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12 * 1024**2


def test_no_path_of_any_machine_is_carried() -> None:
    for path in (DATA_FOLDER / "adapters").rglob("*.json"):
        text = path.read_text()
        assert str(Path.home()) + "/" not in text or Path.home() == Path("/")
        assert not re.search(r'"/\w', text), path
