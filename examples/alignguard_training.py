"""Train a utility LoRA on an aligned model, with and without the AlignGuard regulariser, and compare what is forgotten.

    python examples/alignguard_training.py

A pico model is trained to refuse requests with a mark and to answer others; that is the aligned model. Then a LoRA learns
a new task that pulls against the refusals. The table shows the loss of the new task, the loss of the refusals (the drift),
and how much of the weight change lies along the safety Fisher. Takes about half a minute on one CPU core; no download.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sstmerge.alignguard import AlignGuardRegularizer, SafetyCurvature, safety_curvatures

VOCABULARY, PROMPT, RESPONSE = 64, 8, 4
HARMFUL, HARMLESS = 1, 2
REFUSAL = torch.tensor([5, 6, 7, 8])


def conversations(seed: int, kind: str, count: int) -> dict[str, Tensor]:
    """Return prompts of random tokens after a mark, with responses: a refusal, the prompt's end, or its end reversed."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(16, VOCABULARY, (count, PROMPT), generator=generator)
    prompt[:, 0] = HARMFUL if kind == "refuse" else HARMLESS
    responses = {
        "refuse": REFUSAL.expand(count, -1),
        "copy": prompt[:, -RESPONSE:],
        "reverse": prompt[:, -RESPONSE:].flip(1),
    }
    ids = torch.cat([prompt, responses[kind]], dim=1)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def aligned_model(steps: int) -> LlamaForCausalLM:
    """Return a model that copies harmless prompts and refuses harmful ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        loss = sum(model(**conversations(2 * step + i, kind, 32)).loss for i, kind in enumerate(("copy", "refuse")))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def train_utility(
    aligned: Mapping[str, Tensor], steps: int, regularised: bool, weights: Mapping[str, float]
) -> tuple[float, float, float]:
    """Train the LoRA and return the task's loss, the refusals' loss and the change along the safety Fisher."""
    model = LlamaForCausalLM(LlamaConfig(**aligned["config"]))
    model.load_state_dict(aligned["weights"])
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    curvatures: dict[str, SafetyCurvature] = safety_curvatures(
        model, [conversations(10**6 + i, "refuse", 16) for i in range(4)], directions=16
    )
    regularizer = AlignGuardRegularizer(curvatures, **weights)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        loss = model(**conversations(10**7 + step, "reverse", 32)).loss
        if regularised:
            loss = loss + regularizer(model).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        task = model(**conversations(10**8, "reverse", 256)).loss
        refusals = model(**conversations(10**8, "refuse", 256)).loss
        alignment = regularizer(model).alignment
    return task.item(), refusals.item(), alignment.item()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="training steps of the LoRA")
    parser.add_argument("--aligned-steps", type=int, default=200, help="training steps of the aligned model")
    parser.add_argument("--alignment-weight", type=float, default=0.25, help="λ_A")
    parser.add_argument(
        "--task-weight", type=float, default=0.0, help="λ_T; the paper's term shrinks the task's change"
    )
    parser.add_argument("--overlap-weight", type=float, default=0.1, help="λ_NC")
    arguments = parser.parse_args()
    model = aligned_model(arguments.aligned_steps).eval()
    with torch.no_grad():
        start = [model(**conversations(10**8, kind, 256)).loss.item() for kind in ("reverse", "refuse")]
    aligned = {"config": model.config.to_dict(), "weights": model.state_dict()}
    weights = {
        "alignment_weight": arguments.alignment_weight,
        "task_weight": arguments.task_weight,
        "overlap_weight": arguments.overlap_weight,
    }
    print(f"{'':24}{'task loss':>12}{'refusal loss':>14}{'‖F^½ ΔW_A‖²':>14}")
    print(f"{'aligned model':24}{start[0]:12.3f}{start[1]:14.4f}{0.0:14.4f}")
    for name, regularised in (("LoRA", False), ("LoRA with AlignGuard", True)):
        task, refusals, alignment = train_utility(aligned, arguments.steps, regularised, weights)
        print(f"{name:24}{task:12.3f}{refusals:14.4f}{alignment:14.4f}")


if __name__ == "__main__":
    main()
