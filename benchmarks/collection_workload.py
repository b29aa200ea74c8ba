"""What a collection benchmark runs on: a model, adapters, batches, and the bare passes that every ratio refers to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors, load_adapter
from sstmerge.fisher import Batch
from sstmerge.fisher.head import Head, label_scores
from sstmerge.fisher.taps import frozen
from sstmerge.pipeline.calibration import CollectionOptions, batches_of
from sstmerge.pipeline.models import load_model, load_tokenizer
from sstmerge.prompts import load_examples

DATA = Path(__file__).resolve().parent.parent / "sstmerge" / "data"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
VOCABULARY = 2000
# Hidden size, intermediate size, layers.
RANDOM_MODELS = {"hidden 512": (512, 1376, 6), "hidden 1024": (1024, 2752, 2), "1B": (2048, 8192, 16)}


@dataclass
class Workload:
    """A model with two adapters of the same layers, and data.

    Attributes:
        name: The model in words.
        load: Makes the base model.
        adapters: Two adapters; PEFT runs the first one.
        batches: The data, on which the labels are those of the data for everybody.
    """

    name: str
    load: Callable[[], nn.Module]
    adapters: list[Adapter]
    batches: list[Batch]

    @cached_property
    def model(self) -> nn.Module:
        """The base model, frozen."""
        return self.load().eval().requires_grad_(False)

    @cached_property
    def peft_model(self) -> nn.Module:
        """The PEFT model whose LoRA weights alone require gradients."""
        return self.fresh_peft_model()

    @cached_property
    def space(self) -> CoreSpace:
        """The core space of both adapters."""
        return CoreSpace.of(self.adapters)

    @property
    def tokens(self) -> int:
        """Real tokens of all batches."""
        return sum(int(batch.attention_mask.sum()) for batch in self.batches)

    def fresh_peft_model(self) -> nn.Module:
        """Return a PEFT model of its own, for peers that change the model."""
        first = self.adapters[0]
        rank = next(iter(first.layers.values())).rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
        model: PeftModel = get_peft_model(self.load(), config, autocast_adapter_dtype=False)
        modules = dict(model.get_base_model().named_modules())
        with torch.no_grad():
            for name, factors in first.layers.items():
                modules[name].lora_A["default"].weight.copy_(factors.A)
                modules[name].lora_B["default"].weight.copy_(factors.scaling * factors.B)
        return model.eval()


def random_workload(name: str, batches: int, sequences: int = 8) -> Workload:
    """Return one of `RANDOM_MODELS` with two random adapters and full batches of `sequences` x 128 random tokens."""
    return sized_workload(name, *RANDOM_MODELS[name], batches=batches, sequences=sequences)


def sized_workload(
    name: str,
    hidden: int,
    intermediate: int,
    layers: int,
    *,
    batches: int,
    sequences: int = 8,
    rank: int = RANK,
    adapters: int = 2,
) -> Workload:
    """Return a random Llama of these sizes with random adapters and full batches of `sequences` x 128 random tokens."""

    def load() -> nn.Module:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=8,
                num_key_value_heads=8,
                max_position_embeddings=256,
            )
        )

    named = [_random_adapter(f"a{i}", hidden, intermediate, layers, rank, seed=i) for i in range(adapters)]
    return Workload(name, load, named, _full(batches, sequences))


def demo_workload(base: str, limit: int) -> Workload:
    """Return the demo's model (or another of its shapes) with the adapters and benign prompts that the package carries."""
    batches = batches_of(
        load_model(base),
        load_tokenizer(base),
        load_examples(str(DATA / "benign.jsonl"), split="calibration", limit=limit),
        CollectionOptions(),
    )
    adapters = [load_adapter(DATA / "adapters" / name, name=name) for name in ("utility", "safety")]
    return Workload(Path(base).name, lambda: load_model(base), adapters, batches)


def _random_adapter(name: str, hidden: int, intermediate: int, layers: int, rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = dict.fromkeys(TARGETS[:4], (hidden, hidden)) | dict.fromkeys(TARGETS[4:6], (intermediate, hidden))
    shapes["down_proj"] = (hidden, intermediate)
    factors = {}
    for layer in range(layers):
        for target, (rows, columns) in shapes.items():
            block = "self_attn" if target in TARGETS[:4] else "mlp"
            A = 0.02 * torch.randn(rank, columns, generator=generator)
            B = 0.02 * torch.randn(rows, rank, generator=generator)
            factors[f"model.layers.{layer}.{block}.{target}"] = LoraFactors(A, B, 1.0)
    return Adapter(name, factors)


def _full(count: int, size: int, length: int = 128) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        ids = torch.randint(VOCABULARY, (size, length), generator=generator)
        loss_mask = torch.ones(size, length, dtype=torch.bool)
        loss_mask[:, 0] = False
        index = torch.arange(number * size, (number + 1) * size)
        batches.append(Batch(ids, torch.ones_like(ids), loss_mask, index, torch.ones(size)))
    return batches


# ---- bare passes -----------------------------------------------------------------------------------------------------


def labels_of(batch: Batch) -> Tensor:
    """Return the labels with -100 where a token does not enter the loss, shape (B, S)."""
    return torch.where(batch.loss_mask, batch.input_ids, -100)


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the summed cross entropy of the response tokens, as a user would compute it."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels_of(batch)[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )


def bare(work: Workload) -> Callable[[], None]:
    """Forward and backward with the gradients of the LoRA weights: what fine-tuning pays."""
    model = work.peft_model

    def run() -> None:
        for batch in work.batches:
            summed_loss(model, batch).backward()
            model.zero_grad()

    return run


def activation_gradients(work: Workload, *, peft: bool) -> Callable[[], None]:
    """Forward and backward without any weight's gradient, down to the embeddings: what any per-example method pays."""
    model = work.peft_model if peft else work.model

    def run() -> None:
        with frozen(model), _embeddings_require_grad(model):
            for batch in work.batches:
                summed_loss(model, batch).backward()

    return run


def activation_gradients_of_responses(work: Workload) -> Callable[[], None]:
    """The same with this package's chunked head, and a backward pass that ends in the first block: no taps."""
    model, head = work.model, Head(work.model)

    def run() -> None:
        with frozen(model), _first_block_requires_grad(model):
            for batch in work.batches:
                captured: list[Tensor] = []
                with head.capturing(captured):
                    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                predicts = torch.zeros_like(batch.loss_mask)
                predicts[:, :-1] = batch.loss_mask[:, 1:]
                hidden = captured[0][predicts]
                labels = batch.input_ids[:, 1:][batch.loss_mask[:, 1:]]
                weight = torch.ones(len(labels))
                gradients = label_scores(head, hidden, lambda p, rows, y=labels: y[rows][None], weight)
                hidden.backward(gradients[0])

    return run


@contextmanager
def _first_block_requires_grad(model: nn.Module) -> Iterator[None]:
    anchor = torch.zeros((), requires_grad=True)
    layers = [m for name, m in model.named_modules() if ".layers.0." in name and isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(lambda m, args, output: output + anchor.to(output.dtype)) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _embeddings_require_grad(model: nn.Module) -> Iterator[None]:
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
