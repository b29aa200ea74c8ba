"""Base models that are not just a transformers model on one device: every one counts, or is refused in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import VOCABULARY, random_adapter, random_batch
from peft import LoraConfig, get_peft_model
from pico_models import TOKEN_IDS, draw_weights
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from sstmerge.adapters import CoreSpace, load_adapter
from sstmerge.errors import AdapterError, InputError
from sstmerge.fisher import Fisher, collect_fisher, installed_taps
from sstmerge.fisher.fingerprints import model_fingerprint
from sstmerge.fisher.placement import input_device

BATCH = random_batch([9, 7, 5])
BERT = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def space_of(model: nn.Module, targets: Sequence[str] = ("q_proj", "v_proj", "down_proj")) -> CoreSpace:
    return CoreSpace.of([random_adapter(model, name, targets=targets, seed=i) for i, name in enumerate("ab")])


def collect(model: nn.Module, space: CoreSpace) -> Fisher:
    return collect_fisher(model, [BATCH], space, structure="kfac", labels="sampled", reference="a")


def factors(fisher: Fisher) -> Tensor:
    return torch.cat([factor.flatten() for pair in fisher.kronecker_factors() for factor in pair])


@pytest.fixture
def expected(pico_llama) -> tuple[CoreSpace, Tensor, str]:
    """A space, the factors that a model in memory gives, and the model's fingerprint."""
    model = pico_llama()
    space = space_of(model)
    return space, factors(collect(model, space)), model_fingerprint(model)


def on_cpu_offload(model: PreTrainedModel, folder: Path) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk_offload(model: PreTrainedModel, folder: Path) -> nn.Module:
    from accelerate import disk_offload

    disk_offload(model, str(folder / "offload"), execution_device=torch.device("cpu"))
    return model


def on_a_device_map(model: PreTrainedModel, folder: Path) -> nn.Module:
    """Half of the layers stay on the disk, as `device_map="auto"` does with a model that does not fit."""
    model.save_pretrained(folder / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map={**places, "model.layers.1": "disk"}, offload_folder=str(folder / "offload")
    )


def compiled_wrapper(model: PreTrainedModel, folder: Path) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: PreTrainedModel, folder: Path) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_layers(model: PreTrainedModel, folder: Path) -> nn.Module:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def with_sdpa(model: PreTrainedModel, folder: Path) -> nn.Module:
    model.set_attn_implementation("sdpa")
    return model


def with_eager_attention(model: PreTrainedModel, folder: Path) -> nn.Module:
    model.set_attn_implementation("eager")
    return model


PLACEMENTS = [
    on_cpu_offload,
    on_disk_offload,
    on_a_device_map,
    compiled_wrapper,
    compiled_in_place,
    compiled_layers,
    with_sdpa,
    with_eager_attention,
]


@pytest.mark.parametrize("place", PLACEMENTS)
def test_a_base_model_elsewhere_gives_the_same_fisher(place: Callable, expected, pico_llama, tmp_path):
    space, want, fingerprint = expected
    model = place(pico_llama(), tmp_path)
    assert input_device(model) == torch.device("cpu")
    with torch.no_grad():
        model(input_ids=BATCH.input_ids)  # what compiles, compiles before there are hooks

    fisher = collect(model, space)

    assert float((factors(fisher) - want).norm()) < 1e-6 * float(want.norm())
    assert fisher.metadata["model"] == fingerprint


@pytest.mark.parametrize("place", [compiled_wrapper, compiled_in_place, compiled_layers])
def test_a_compiled_model_moves_to_a_point_and_back(place, pico_llama, tmp_path):
    """What was compiled before a hook was registered does not call it."""
    plain, model = pico_llama(), place(pico_llama(), tmp_path)
    space = space_of(plain)
    point = space.core("a")

    with torch.no_grad():
        base = model(input_ids=BATCH.input_ids).logits
        with installed_taps(model, space, point):
            moved = model(input_ids=BATCH.input_ids).logits
        again = model(input_ids=BATCH.input_ids).logits
        with installed_taps(plain, space, point):
            want = plain(input_ids=BATCH.input_ids).logits

    assert float((want - base).norm()) > 1
    assert torch.allclose(moved, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, base)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_by_bitsandbytes(bits, pico_llama, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from sstmerge.pipeline.models import load_model

    config = pico_llama().config
    config.hidden_size, config.head_dim, config.intermediate_size = 256, 64, 256  # bitsandbytes takes blocks of 64
    plain = draw_weights(AutoModelForCausalLM.from_config(config), seed=0, std=0.05)
    plain.save_pretrained(tmp_path)
    space = space_of(plain)

    model = load_model(str(tmp_path), quantization=f"{bits}bit", device="cpu")
    with torch.no_grad():
        model(BATCH.input_ids)  # 4-bit layers repack their weights at the first pass, if they are let
    found = collect(model, space).kronecker_factors()

    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):  # 8 bits are compared with the float model
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    for pairs in zip(found, collect(plain, space).kronecker_factors(), strict=True):
        for mine, theirs in zip(*pairs, strict=True):
            assert float((mine - theirs).norm()) < (0.15 if bits == 8 else 1e-3) * float(theirs.norm())


class RepackedLinear(nn.Linear):
    """Does what bitsandbytes' 4-bit layers do on CPUs with bfloat16 instructions: after inference, no gradient flows."""

    support_avx512bf16_for_cpu = False

    def forward(self, x: Tensor) -> Tensor:
        if self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad:
            self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
        output = super().forward(x)
        return output.detach() if hasattr(self.weight, "quant_state") else output


def test_layers_that_would_lose_their_gradients_keep_them(expected, pico_llama):
    space, want, _ = expected
    model = pico_llama()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not model.lm_head]
    for layer in layers:
        layer.__class__ = RepackedLinear
        layer.support_avx512bf16_for_cpu = True
    assert torch.equal(factors(collect(model, space)), want)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    with torch.no_grad():
        model.eval()(BATCH.input_ids)  # the user's own inference
    with pytest.raises(
        InputError, match=r"bitsandbytes has repacked the 4-bit weights of '.*q_proj'.*Load the model anew"
    ):
        collect(model, space)


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        **TOKEN_IDS,
    )
    return draw_weights(MixtralForCausalLM(config), seed=0)


def test_the_attention_of_a_mixture_of_experts_is_measured():
    model = mixtral()
    space = space_of(model, targets=("q_proj", "v_proj"))
    fisher = collect(model, space)
    alone = [collect_fisher(model, [BATCH.select(BATCH.index == i)], space, structure="kfac") for i in range(3)]
    together = collect_fisher(model, [BATCH], space, structure="kfac")
    assert float(factors(fisher).norm()) > 0
    assert torch.allclose(factors(sum(alone[1:], alone[0])), factors(together), rtol=1e-4, atol=1e-8)


def test_a_router_is_refused():
    model = mixtral()
    with pytest.raises(AdapterError, match=r"mlp\.gate' of the model is a \w+, which returns no single tensor"):
        collect(model, space_of(model, targets=("gate",)))


def test_target_parameters_are_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    get_peft_model(mixtral(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="uses target_parameters, which sstmerge does not support"):
        load_adapter(tmp_path, name="x")


class RoutedExpert(nn.Module):
    """A feed-forward part in which a token goes through one of two linear experts, as remote code often has it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(size, size, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = rows[:, 0] > 0
        out = torch.zeros_like(rows)
        out[chosen], out[~chosen] = self.first(rows[chosen]), self.second(rows[~chosen])
        return out.view_as(x)


def test_a_routed_expert_is_refused(pico_llama):
    model = pico_llama()
    model.model.layers[0].mlp = RoutedExpert(32)
    with pytest.raises(InputError, match="cannot be told apart by sequence"):
        collect(model, space_of(model, targets=("first",)))


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(InputError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        collect(model, space_of(model, targets=("q", "v")))


@pytest.mark.parametrize(
    ("kind", "words"),
    [(BertForMaskedLM, "depends on later ones"), (BertForSequenceClassification, "no output embeddings")],
)
def test_an_encoder_is_refused(kind, words):
    model = draw_weights(kind(BertConfig(**BERT)), seed=0)
    with pytest.raises(InputError, match=words):
        collect(model, space_of(model, targets=("query", "value")))


def test_the_decoder_of_the_same_family_is_measured():
    model = draw_weights(BertLMHeadModel(BertConfig(**BERT, is_decoder=True)), seed=0)
    assert float(factors(collect(model, space_of(model, targets=("query", "value")))).norm()) > 0


def test_an_adapted_embedding_is_refused(pico_llama, tmp_path):
    get_peft_model(pico_llama(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="embed_tokens"):
        load_adapter(tmp_path, name="x")


def test_weights_that_are_nowhere_are_named(pico_llama):
    model = pico_llama().to("meta")
    with pytest.raises(InputError, match="meta device"):
        collect(model, space_of(pico_llama()))


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Write a Llama as llama.cpp's converter does, in float32."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        for projection, count in heads.items():
            if projection in name:  # llama.cpp rotates neighbouring pairs, transformers the two halves
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_base_from_a_gguf_file(expected, pico_llama, tmp_path):
    from sstmerge.pipeline.models import load_model

    space, want, _ = expected
    write_gguf(pico_llama(), tmp_path / "model.gguf")
    model = load_model(str(tmp_path / "model.gguf"), device="cpu", dtype="float32")
    assert float((factors(collect(model, space)) - want).norm()) < 1e-5 * float(want.norm())
