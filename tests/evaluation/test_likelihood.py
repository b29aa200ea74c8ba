"""Log-likelihoods, perplexity and classification on small models, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sstmerge.errors import DataError, InputError
from sstmerge.evaluation.classification import classify
from sstmerge.evaluation.likelihood import continuation_log_likelihoods, perplexities
from sstmerge.prompts import Example, prompt_tokens

PAIRS = [([5, 6, 7, 8, 9], [10]), ([5, 6, 7, 8, 9], [11]), ([20], [21, 22, 23]), ([30, 31], [32, 33]), ([40] * 9, [41])]


def example(prompt, response=None):
    return Example(({"role": "user", "content": prompt},), response, 1.0, "test.jsonl, row 1")


def alone(model, context, continuation):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *continuation]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(context) - 1 + t, token]) for t, token in enumerate(continuation))


@pytest.mark.parametrize("kind", ["pico_llama", "pico_gpt2"])
@pytest.mark.parametrize("tokens_per_batch", [1, 12, 8192])
def test_padding_and_batches_change_nothing(request, kind, tokens_per_batch):
    model = request.getfixturevalue(kind)()
    found = continuation_log_likelihoods(model, PAIRS, tokens_per_batch=tokens_per_batch)
    assert found == pytest.approx([alone(model, *pair) for pair in PAIRS], abs=1e-5)


@pytest.mark.parametrize("kind", ["pico_llama", "pico_gpt2"])
def test_contexts_that_begin_alike(request, kind):
    model = request.getfixturevalue(kind)()
    alike = [([*range(20, 32), *context], continuation) for context, continuation in PAIRS]
    found = continuation_log_likelihoods(model, alike, tokens_per_batch=40)
    assert found == pytest.approx([alone(model, *pair) for pair in alike], abs=1e-5)


def test_a_peft_model_counts_with_its_adapter(pico_llama):
    torch.manual_seed(0)
    model = get_peft_model(pico_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    found = continuation_log_likelihoods(model, PAIRS)
    assert found == pytest.approx([alone(model.eval(), *pair) for pair in PAIRS], abs=1e-5)
    with model.disable_adapter():
        assert continuation_log_likelihoods(model, PAIRS) != pytest.approx(found, abs=1e-3)


def test_labels_of_one_token_share_a_pass(pico_llama):
    passes = []
    continuation_log_likelihoods(pico_llama(), PAIRS[:2], progress=passes.append)
    assert sum(passes) == 1


def test_arguments(pico_llama):
    with pytest.raises(InputError, match="Pair 1 has an empty continuation"):
        continuation_log_likelihoods(pico_llama(), [([1], [2]), ([1], [])])
    with pytest.raises(InputError, match="Pair 0 has an empty context"):
        continuation_log_likelihoods(pico_llama(), [([], [2])])
    with pytest.raises(InputError, match="tokens_per_batch"):
        continuation_log_likelihoods(pico_llama(), PAIRS, tokens_per_batch=0)


def test_perplexity(pico_llama, pico_tokenizer):
    model, tokenizer = pico_llama(), pico_tokenizer()
    prompts = [example("Say it"), example("Hello there"), example("x")]
    found = perplexities(model, tokenizer, prompts, ["yes", "", "no!"])
    for value, prompt, text in ((found[0], prompts[0], "yes"), (found[2], prompts[2], "no!")):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        expected = math.exp(-alone(model, prompt_tokens(prompt, tokenizer), tokens) / len(tokens))
        assert value == pytest.approx(expected, rel=1e-4)
    assert math.isnan(found[1])
    with pytest.raises(DataError, match="1 completions for 3 prompts"):
        perplexities(model, tokenizer, prompts, ["yes"])


def test_classification(pico_llama, pico_tokenizer):
    model, tokenizer = pico_llama(), pico_tokenizer()
    examples = [example("abc", "no"), example("some longer text", "yes"), example("z", "no"), example("q?", "maybe")]
    labels = ("yes", "no", "maybe")
    found = classify(model, tokenizer, examples, labels)
    expected = [
        [alone(model, prompt_tokens(e, tokenizer), tokenizer.encode(w, add_special_tokens=False)) for w in labels]
        for e in examples
    ]
    assert found.log_likelihoods == pytest.approx(np.array(expected), abs=1e-4)
    best = [labels[int(np.argmax(row))] for row in expected]
    assert list(found.predicted) == best
    assert found.accuracy.count == sum(b == e.response for b, e in zip(best, examples, strict=True))
    assert found.to_json()["predicted"] == best


def test_classification_of_nothing(pico_llama, pico_tokenizer):
    with pytest.raises(DataError, match="'perhaps' is none of the labels"):
        classify(pico_llama(), pico_tokenizer(), [example("a", "perhaps")], ("yes", "no"))
    for labels in (("yes",), ("yes", "yes")):
        with pytest.raises(DataError, match="two different labels"):
            classify(pico_llama(), pico_tokenizer(), [example("a", "yes")], labels)
