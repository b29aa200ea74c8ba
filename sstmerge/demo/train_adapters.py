"""Train the two LoRA adapters that the package carries: one that refuses (too much), one with a checkable skill.

`safety` learns refusals of harmful requests and sees only a few ordinary prompts, so that it over-refuses as real
safety adapters do: no harmless prompt is ever labelled with a refusal. `utility` learns to write order records and is
held to the base model's own answers on other prompts, so that it changes little else; without that, adding the two
adapters undoes the refusals. Ranks and target modules differ on purpose: merging must cope with that.

    python -m sstmerge.demo.train_adapters --out sstmerge/data/adapters

The same seed and number of threads give the same bits; another number of threads changes the rounding.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer

from sstmerge.atomic import atomic_directory, refuse_existing
from sstmerge.demo.model import BASE_MODEL_NAME, demo_model
from sstmerge.errors import DataError
from sstmerge.evaluation.generate import generate
from sstmerge.fisher.batch import Batch
from sstmerge.prompts import EncodedExample, Example, encode, load_examples, make_batches

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_LENGTH = 128
ANCHOR_TOKENS = 28

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained.

    Attributes:
        name: Name of the adapter and of its directory.
        rows: Prompt file (without ".jsonl") and how many of its training rows are used, drawn at random; None for all.
        rank: LoRA rank r.
        alpha: LoRA alpha; the scaling is alpha / rank.
        target_modules: Names of the adapted linear layers.
        learning_rate: Peak learning rate of AdamW, reached after a tenth of the steps and then decayed linearly.
        epochs: Passes over the rows.
        anchors: Like `rows`, but the response is what the base model itself answers: the adapter is to change nothing.
        batch_size: Sequences per step.
    """

    name: str
    rows: tuple[tuple[str, int | None], ...]
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    learning_rate: float
    epochs: int
    anchors: tuple[tuple[str, int | None], ...] = ()
    batch_size: int = 8


SAFETY = Recipe("safety", (("harmful", None), ("benign", None)), 8, 16, ALL_LINEAR, learning_rate=5e-4, epochs=3)
UTILITY = Recipe(
    "utility",
    (("utility", 320),),
    rank=4,
    alpha=8,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    learning_rate=7e-4,
    epochs=2,
    anchors=(("benign", 40), ("borderline", 30)),
)
RECIPES = {recipe.name: recipe for recipe in (SAFETY, UTILITY)}


def draw_training_rows(rows: Sequence[tuple[str, int | None]], seed: int) -> list[Example]:
    """Draw training rows of the package's prompt files.

    Args:
        rows: Prompt files (without ".jsonl") and how many rows to draw of each; None for all.
        seed: Seed of the draw.

    Returns:
        Examples with responses, file after file.

    Raises:
        DataError: If more rows of a file are wanted than there are.
    """
    drawn: list[Example] = []
    for file, count in rows:
        examples = load_examples(DATA_FOLDER / f"{file}.jsonl", split="train", require_response=True)
        if count is not None and count > len(examples):
            raise DataError(f"{count} training rows of {file}.jsonl were asked for, which has {len(examples)}.")
        drawn += examples if count is None else random.Random(seed).sample(examples, count)
    return drawn


def encode_anchors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int = MAX_LENGTH,
) -> list[EncodedExample]:
    """Replace the responses by the beginnings of the base model's own greedy answers, and encode them.

    Args:
        model: The base model, without adapters.
        tokenizer: Its tokenizer.
        examples: Prompts; their responses are not looked at.
        max_length: Longest sequence, in tokens.

    Returns:
        One encoded example for each example. A long answer is cut, and its cut end is not taught as an end.
    """
    answers = generate(model, tokenizer, examples, max_new_tokens=ANCHOR_TOKENS + 8)
    own = [replace(example, response=answer) for example, answer in zip(examples, answers, strict=True)]
    return encode(own, tokenizer, max_length=max_length, response_tokens=ANCHOR_TOKENS)


def train_adapter(model_directory: Path, recipe: Recipe, out: Path, *, seed: int = 0, overwrite: bool = False) -> None:
    """Train one adapter and write it as a PEFT directory `out / recipe.name` with bfloat16 factors.

    Args:
        model_directory: The base model, as `demo_model` returns it.
        recipe: What to train on and how.
        out: Folder that the adapter's directory is made in.
        seed: Seed of the rows, their order and the initial factors.
        overwrite: Replace an existing adapter directory.

    Raises:
        OutputError: If the directory exists or cannot be written.
    """
    refuse_existing(out / recipe.name, overwrite=overwrite)
    tokenizer = AutoTokenizer.from_pretrained(model_directory, trust_remote_code=False)
    encoded = encode(draw_training_rows(recipe.rows, seed), tokenizer, max_length=MAX_LENGTH)
    # On a CPU the backward pass of the fused bfloat16 attention alone costs a fifth of a step.
    base = AutoModelForCausalLM.from_pretrained(
        model_directory, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=False
    )
    if recipe.anchors:
        encoded += encode_anchors(base, tokenizer, draw_training_rows(recipe.anchors, seed))
    fit_adapter(base, encoded, recipe, out, pad_token_id=tokenizer.pad_token_id, seed=seed, overwrite=overwrite)


def fit_adapter(
    base: PreTrainedModel,
    encoded: Sequence[EncodedExample],
    recipe: Recipe,
    out: Path,
    *,
    pad_token_id: int,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train one adapter on encoded examples and write it as a PEFT directory `out / recipe.name`.

    Args:
        base: The base model; its layers are wrapped by PEFT, so load it again for another adapter.
        encoded: The examples; the recipe's `rows` and `anchors` are not looked at.
        recipe: How to train.
        out: Folder that the adapter's directory is made in.
        pad_token_id: Token id that fills shorter sequences.
        seed: Seed of the order of the examples and of the initial factors.
        overwrite: Replace an existing adapter directory.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    _fit(model, shuffled_batches(encoded, recipe, pad_token_id, seed), recipe)
    _save(model, out / recipe.name, recipe, overwrite=overwrite)


def shuffled_batches(encoded: Sequence[EncodedExample], recipe: Recipe, pad_token_id: int, seed: int) -> list[Batch]:
    """Return the batches of all epochs, every epoch in a new random order."""
    rng = random.Random(seed)
    batches: list[Batch] = []
    for _ in range(recipe.epochs):
        order = rng.sample(list(encoded), len(encoded))
        for start in range(0, len(order), recipe.batch_size):
            group = order[start : start + recipe.batch_size]
            batches += make_batches(group, pad_token_id=pad_token_id, tokens_per_batch=MAX_LENGTH * len(group))
    return batches


def response_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood of the response tokens.

    Args:
        logits: Shape (B, S, vocabulary); position t predicts token t + 1.
        batch: The sequences and their loss mask.

    Returns:
        A scalar, float32, in nats.
    """
    wanted = batch.loss_mask[:, 1:]
    return cross_entropy(logits[:, :-1][wanted].float(), batch.input_ids[:, 1:][wanted])


def _fit(model: PeftModel, batches: Sequence[Batch], recipe: Recipe) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    warm_up = max(1, len(batches) // 10)
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (len(batches) - step) / max(1, len(batches) - warm_up))
    )
    model.train()
    losses: list[float] = []
    for batch in track(batches, description=f"Training {recipe.name}"):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = response_loss(logits, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tail = losses[-max(1, len(losses) // 10) :]
    _log.info("%s: mean loss of the last tenth of %d steps %.3f nats", recipe.name, len(losses), sum(tail) / len(tail))


def _save(model: PeftModel, directory: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Write factors and configuration without PEFT's model card, and without any path of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_MODEL_NAME
    config.inference_mode = True
    config.target_modules = sorted(recipe.target_modules)  # PEFT keeps a set, whose order changes from run to run
    factors = {
        name: factor.to(torch.bfloat16).contiguous() for name, factor in get_peft_model_state_dict(model).items()
    }
    with atomic_directory(directory, overwrite=overwrite) as temporary:
        save_file(factors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(temporary)


def main() -> None:
    """Train the adapters named on the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's adapters.")
    parser.add_argument(
        "--model", type=Path, help="directory of the base model (default: the demo's, fetched if need be)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter directories")
    parser.add_argument("--only", choices=sorted(RECIPES), help="train this adapter alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace existing adapter directories")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = arguments.model or demo_model()
    for name, recipe in RECIPES.items():
        if arguments.only in (None, name):
            train_adapter(model, recipe, arguments.out, seed=arguments.seed, overwrite=arguments.overwrite)


if __name__ == "__main__":
    main()
