"""A pytest plugin for PEFT's own tests: sstmerge's backend in place, tiny random models in place of the hub's.

With SSTMERGE_PEFT_TESTS_PLAIN=1 the backend stays out, which shows what PEFT's own function does in the same setting.
"""

from __future__ import annotations

import os
import sys
import types
from collections import Counter

import pytest
import transformers
from peft.tuners.lora import LoraModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

import sstmerge

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024, "n_positions": 512}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 1024}
BART = {"d_model": 32, "vocab_size": 1024} | {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}
BERT = {**SMALL, "intermediate_size": 48}
DEBERTA = {**BERT, "pos_att_type": ["c2p", "p2c"], "relative_attention": True}
EXPERTS = {**LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
# The first entry whose key is part of a model's hub id describes its stand-in.
STAND_INS = {
    "OPTFor": ("OPTConfig", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPTJ": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "GPT2": ("GPT2Config", GPT),
    "gpt2": ("GPT2Config", GPT),
    "tiny-Llama4": ("Llama4TextConfig", EXPERTS),
    "GptOss": ("GptOssConfig", EXPERTS),
    "Llama": ("LlamaConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA),
    "Gemma3": ("Gemma3TextConfig", {**LLAMA, "head_dim": 8}),
    "T5": ("T5Config", {**T5, "decoder_start_token_id": 0}),
    "Bart": ("BartConfig", BART),
    "DebertaV2": ("DebertaV2Config", DEBERTA),
    "Deberta": ("DebertaConfig", DEBERTA),
    "Roberta": ("RobertaConfig", BERT),
    "bert-base": ("BertConfig", BERT),
    "Bert": ("BertConfig", BERT),
}

calls: Counter[str] = Counter()
current = {"test": ""}


def stand_in(cls, model_id, **_):
    for key, (config, values) in STAND_INS.items():
        if key in str(model_id):
            return cls.from_config(getattr(transformers, config)(**values))
    raise OSError(f"no stand-in for the hub model {model_id!r}")


def without_diffusers():
    """PEFT's common test file imports diffusers, for tests that are not run here."""
    stub = types.ModuleType("diffusers")
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules.setdefault("diffusers", stub)


def pytest_configure(config):
    try:
        import diffusers  # noqa: F401
    except ImportError:
        without_diffusers()
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: PEFT's")
    for found in vars(modeling_auto).values():  # each has its own copy of the method
        if isinstance(found, type) and issubclass(found, _BaseAutoModelClass):
            found.from_pretrained = classmethod(stand_in)
    if os.environ.get("SSTMERGE_PEFT_TESTS_PLAIN") != "1":
        config._sstmerge_backend = sstmerge.peft_backend()
        config._sstmerge_backend.__enter__()
    merge = LoraModel.add_weighted_adapter

    def counted(*arguments, **options):
        calls[current["test"]] += 1
        return merge(*arguments, **options)

    LoraModel.add_weighted_adapter = counted


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    current["test"] = item.nodeid


def pytest_terminal_summary(terminalreporter):
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", ())]
    reached = sum(1 for test in passed if calls[test])
    terminalreporter.write_line(
        f"add_weighted_adapter was called {sum(calls.values())} times in {len(calls)} tests; {reached} of those passed"
    )
