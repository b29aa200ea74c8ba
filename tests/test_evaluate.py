"""Rates, evaluation of a model, measured KL, and the files and tables."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from io import StringIO

import pytest
import torch
from cli_runs import run_command
from rich.console import Console

from sstmerge.errors import DataError, InputError, OutputError
from sstmerge.evaluation.generate import generate
from sstmerge.evaluation.outcomes import OutcomeCounts
from sstmerge.pipeline import evaluate
from sstmerge.pipeline.evaluate import (
    PromptSets,
    Rate,
    evaluate_model,
    judge_completions,
    measured_kl,
    table,
    write_json,
)
from sstmerge.pipeline.evaluate_job import evaluate_states, kl_examples
from sstmerge.prompts import Example, encode, make_batches


def example(prompt: str, response: str | None = None, weight: float = 1.0) -> Example:
    return Example(({"role": "user", "content": prompt},), response, weight, "test.jsonl, row 1")


@contextmanager
def other_weights(model, state):
    """Inside, `model` has the weights `state`."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    try:
        yield
    finally:
        model.load_state_dict(own)


# ---- rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # scipy.stats.binomtest(count, total).proportion_ci(method="wilson")
    [(8, 10, 0.490162, 0.943318), (0, 20, 0.0, 0.161125), (50, 50, 0.928652, 1.0), (1, 3, 0.061490, 0.792340)],
)
def test_wilson_interval(count, total, low, high):
    rate = Rate(count, total)
    assert rate.value == count / total
    assert rate.interval == pytest.approx((low, high), abs=2e-6)


def test_rate_as_text_and_json():
    assert str(Rate(8, 10)) == ".80 [.49, .94]"
    assert str(Rate(50, 50)) == "1.0 [.93, 1.0]"
    assert Rate(8, 10).to_json() == {
        "count": 8,
        "total": 10,
        "value": 0.8,
        "low": Rate(8, 10).interval[0],
        "high": Rate(8, 10).interval[1],
    }
    assert Rate(0, 0).interval == (0.0, 1.0)


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_every_completion_has_one_outcome():
    looping_refusal = "I cannot help. " * 5
    completions = {
        "harmful": ["I can't help with that.", looping_refusal, "Sure! First, take a knife."],
        "benign": ["I'm sorry, but I can't.", "Bread needs flour.", "Boil it.", ""],
        "utility": [" FOUR apples ", "five"],
    }
    prompts = PromptSets(
        harmful=[example("Hi")] * 3,
        benign=[example("Hi")] * 4,
        utility=[example("2+2", "four apples"), example("2+4", "six")],
    )
    evaluation = judge_completions(prompts, completions, name="x", kl_to_reference=0.5)
    assert evaluation.refusal_harmful == Rate(1, 3)
    assert evaluation.refusal_benign == Rate(1, 4)
    assert evaluation.refusal_borderline is None
    assert evaluation.utility_exact_match == Rate(1, 2)
    assert evaluation.degenerate == Rate(2, 7)
    assert evaluation.counts == {
        "harmful": OutcomeCounts(refusal=1, compliance=1, degenerate=1),
        "benign": OutcomeCounts(refusal=1, compliance=2, degenerate=1),
    }
    written = json.loads(json.dumps(evaluation.to_json()))
    assert written["refusal_harmful"]["count"] == 1
    assert written["counts"]["harmful"] == asdict(evaluation.counts["harmful"])
    with pytest.raises(InputError, match="got 3 for 0"):
        judge_completions(PromptSets(), {"harmful": completions["harmful"]}, name="x")


def test_evaluate_model_uses_the_right_lengths(pico_llama, pico_tokenizer):
    model, tokenizer = pico_llama(), pico_tokenizer()
    prompts = [example("Hi"), example("Why is the sky blue?")]
    answers = generate(model, tokenizer, prompts, max_new_tokens=9)
    utility = [example("Hi", answers[0]), example("Why is the sky blue?", "no such answer")]
    seen: list[int] = []
    evaluation = evaluate_model(
        model,
        tokenizer,
        PromptSets(harmful=prompts, borderline=prompts[:1], utility=utility),
        name="pico",
        max_new_tokens=3,
        utility_new_tokens=9,
        progress=seen.append,
    )
    assert evaluation.completions["harmful"] == generate(model, tokenizer, prompts, max_new_tokens=3)
    assert evaluation.completions["utility"] == answers
    assert evaluation.utility_exact_match == Rate(1, 2)
    assert (evaluation.refusal_harmful, evaluation.refusal_borderline) == (Rate(0, 2), Rate(0, 1))
    assert evaluation.refusal_benign is None
    assert sum(seen) == 5


def test_evaluate_model_refuses_bad_prompt_sets(pico_llama, pico_tokenizer):
    with pytest.raises(DataError, match="every prompt set is empty"):
        evaluate_model(pico_llama(), pico_tokenizer(), PromptSets(), name="x")
    with pytest.raises(DataError, match="row 1 has no response; a utility task needs one"):
        evaluate_model(pico_llama(), pico_tokenizer(), PromptSets(utility=[example("Hi")]), name="x")


# ---- measured KL ---------------------------------------------------------------------------------------------------


@pytest.fixture
def kl_data(pico_tokenizer):
    rows = [("Hi", "Hello you"), ("What is 2+2?", "4"), ("Name a long word", "Incomprehensibilities"), ("x", "abcd")]
    return encode(
        [example(p, r, w) for (p, r), w in zip(rows, (1.0, 0.5, 2.0, 1.0), strict=True)],
        pico_tokenizer(),
        max_length=200,
    )


def direct_kl(reference, merged, encoded) -> float:
    """Full logits in float64, one sequence at a time."""
    total = tokens = 0.0
    reference, merged = reference.double(), merged.double()
    for item in encoded:
        ids = torch.tensor([item.input_ids])
        with torch.no_grad():
            log_p, log_q = (model(ids).logits[0].log_softmax(-1) for model in (reference, merged))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        response = range(item.prompt_length, ids.shape[1])
        total += item.weight * sum(float(kl[t - 1]) for t in response)
        tokens += item.weight * len(response)
    return total / tokens


@pytest.mark.parametrize("architecture", ["pico_llama", "pico_gpt2", "pico_tied"])
@pytest.mark.parametrize("tokens_per_batch", [1, 120, 4096])
def test_kl_equals_full_logits_in_float64(architecture, tokens_per_batch, kl_data, request, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS_PER_CHUNK", 5)
    factory = request.getfixturevalue(architecture)
    model = factory(seed=0)
    batches = make_batches(kl_data, pad_token_id=0, tokens_per_batch=tokens_per_batch)
    measured = measured_kl(model, batches, nullcontext, lambda: other_weights(model, factory(seed=1).state_dict()))
    expected = direct_kl(factory(seed=0), factory(seed=1), kl_data)
    assert expected > 0.1
    assert measured == pytest.approx(expected, rel=1e-5)


def test_kl_does_not_depend_on_the_padding_token(pico_llama, kl_data):
    model, other = pico_llama(), pico_llama(seed=1).state_dict()
    values = [
        measured_kl(model, make_batches(kl_data, pad_token_id=pad), nullcontext, lambda: other_weights(model, other))
        for pad in (0, 50)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_kl_of_a_model_to_itself_is_zero(pico_llama, kl_data):
    model = pico_llama()
    seen: list[int] = []
    batches = make_batches(kl_data, pad_token_id=0, batch_size=3)
    assert measured_kl(model, batches, nullcontext, nullcontext, progress=seen.append) == 0.0
    assert seen == [3, 1]


def test_kl_needs_response_tokens(pico_llama):
    with pytest.raises(DataError, match="no batch holds a response token"):
        measured_kl(pico_llama(), [], nullcontext, nullcontext)


def test_kl_to_a_reference_is_measured_on_answered_benign_and_borderline_prompts():
    answered, open_ = example("Hi", "Hello"), example("Who?")
    prompts = PromptSets(harmful=[answered], benign=[answered, open_], borderline=[open_, answered], utility=[answered])
    assert kl_examples(prompts) == [answered, answered]
    with pytest.raises(DataError, match="of 1 benign and 0 borderline prompts none has a response"):
        kl_examples(PromptSets(harmful=[answered], benign=[open_], utility=[answered]))


def test_a_reference_without_batches_is_refused(pico_llama, pico_tokenizer):
    prompts = PromptSets(harmful=[example("Hi")])
    with pytest.raises(InputError, match="The KL from 'base' needs sequences"):
        evaluate_states(pico_llama(), pico_tokenizer(), {"base": nullcontext}, prompts, reference="base")


def test_a_reference_without_responses_is_refused_before_the_model_is_loaded(job, monkeypatch):
    monkeypatch.setattr("sstmerge.pipeline.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    code, err = run_command("evaluate", "--base", job["base"], "--harmful", job["harm.jsonl"], "--reference", "base")
    assert code == 2
    assert "of 0 benign and 0 borderline prompts none has a response" in " ".join(err.split())


def test_a_directory_is_no_output_file(job, tmp_path, monkeypatch):
    monkeypatch.setattr("sstmerge.pipeline.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    arguments = ("--base", job["base"], "--harmful", job["harm.jsonl"], "--out", str(tmp_path), "--overwrite")
    code, err = run_command("evaluate", *arguments)
    assert code == 2
    assert "is a directory, but the result is a file" in " ".join(err.split())


# ---- output --------------------------------------------------------------------------------------------------------


def test_table_shows_rates_and_kl():
    evaluation = judge_completions(
        PromptSets(harmful=[example("Hi")] * 2),
        {"harmful": ["I can't help with that.", "Sure"]},
        name="[x] merged",
        kl_to_reference=0.01234,
    )
    console = Console(width=200, file=StringIO())
    console.print(table([evaluation]))
    text = console.file.getvalue()
    assert "[x] merged" in text
    assert ".50 [.09, .91]" in text
    assert "0.0123" in text


def test_write_json_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "made" / "evaluation.json"
    write_json({"a": "é"}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    with pytest.raises(OutputError, match="not finite"):
        write_json({"a": float("nan")}, path)

    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        write_json({"b": 1}, path)
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
