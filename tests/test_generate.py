"""Greedy generation: batching, padding, order, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch

from sstmerge.errors import DataError, InputError
from sstmerge.evaluation.generate import evaluating, generate
from sstmerge.evaluation.shared_prefix import share_prefix
from sstmerge.prompts import Example, prompt_tokens

PROMPTS = ["Hi", "What is the sum of 12 and 30?", "x", "Tell me a story about a horse.", "Why?", "y" * 60, "Ok then"]


def examples(prompts=PROMPTS) -> list[Example]:
    return [
        Example(({"role": "user", "content": prompt},), None, 1.0, f"test.jsonl, row {row}")
        for row, prompt in enumerate(prompts, start=1)
    ]


def greedy_by_hand(model, tokenizer, example: Example, max_new_tokens: int) -> str:
    """Plain argmax without cache, batch or padding."""
    tokens = prompt_tokens(example, tokenizer)
    start = len(tokens)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        tokens = [*tokens, token]
    return tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("architecture", ["pico_llama", "pico_gpt2"])
def test_batches_equal_greedy_decoding_by_hand(architecture, pico_tokenizer, request):
    model, tokenizer = request.getfixturevalue(architecture)(), pico_tokenizer()
    expected = [greedy_by_hand(model, tokenizer, example, 12) for example in examples()]
    assert len(set(expected)) == len(expected)
    for batch_size in (1, 2, 3, 7, 64):
        assert generate(model, tokenizer, examples(), max_new_tokens=12, batch_size=batch_size) == expected


def test_stops_at_the_end_of_turn_in_every_row(pico_llama, pico_tokenizer):
    model, tokenizer = pico_llama(), pico_tokenizer()
    first = generate(model, tokenizer, examples(), max_new_tokens=12)
    # A token from the middle of the first answer becomes a second end token, as chat models have.
    stop = tokenizer(first[0])["input_ids"][4]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    cut = generate(model, tokenizer, examples(), max_new_tokens=12)
    mark = tokenizer.decode([stop])
    assert mark in first[0]
    assert cut == [answer.split(mark)[0].strip() for answer in first]
    assert cut != first


def test_sampling_defaults_of_the_model_do_not_count(pico_llama, pico_tokenizer):
    model, tokenizer = pico_llama(), pico_tokenizer()
    expected = generate(model, tokenizer, examples(), max_new_tokens=12)
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.repetition_penalty = True, 5.0, 3, 2.0
    assert generate(model, tokenizer, examples(), max_new_tokens=12) == expected


def test_modes_padding_and_progress_are_kept(pico_llama, pico_tokenizer):
    model, tokenizer = pico_llama(), pico_tokenizer()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tokenizer.padding_side = "right"
    seen: list[int] = []
    generate(model, tokenizer, examples(), max_new_tokens=2, batch_size=3, progress=seen.append)
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.padding_side == "right"
    assert seen == [3, 3, 1]

    def fail() -> None:
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [module.training for module in model.modules()] == modes


def test_bad_input(pico_llama, pico_tokenizer):
    model, tokenizer = pico_llama(), pico_tokenizer()
    with pytest.raises(DataError, match=r"test\.jsonl, row 2: the prompt has .* more than the context of 512"):
        generate(model, tokenizer, examples(["Hi", "z" * 500]), max_new_tokens=4)
    with pytest.raises(InputError, match="at least 1"):
        generate(model, tokenizer, examples(), max_new_tokens=0)
    assert generate(model, tokenizer, [], max_new_tokens=4) == []


@pytest.mark.parametrize("architecture", ["pico_llama", "pico_gpt2"])
def test_a_shared_beginning_changes_no_answer_and_is_computed_once(architecture, pico_tokenizer, request):
    model, tokenizer = request.getfixturevalue(architecture)(), pico_tokenizer()
    alike = examples([f"Answer shortly: {prompt}" for prompt in PROMPTS])
    expected = [greedy_by_hand(model, tokenizer, example, 8) for example in alike]
    lengths: list[int] = []
    watch = model.register_forward_pre_hook(
        lambda _module, _inputs, arguments: lengths.append(arguments["input_ids"].shape[1]), with_kwargs=True
    )
    assert generate(model, tokenizer, alike, max_new_tokens=8, batch_size=3) == expected
    watch.remove()
    shortest, longest = (pick(len(prompt_tokens(one, tokenizer)) for one in alike) for pick in (min, max))
    shared = lengths[0]
    assert 8 <= shared < shortest
    assert max(lengths[1:]) == longest - shared


def test_a_sliding_window_shares_nothing(pico_llama):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = MistralForCausalLM(
        MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=4)
    ).eval()
    prompts = [[*range(10, 20), 1], [*range(10, 20), 2]]
    assert share_prefix(model, prompts, torch.device("cpu")).tokens == ()
    assert share_prefix(pico_llama().eval(), prompts, torch.device("cpu")).tokens == tuple(range(10, 20))
