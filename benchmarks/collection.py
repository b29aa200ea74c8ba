"""Cost of collecting a Fisher over the bare pass: time and peak memory, as ratios measured in one process.

    python benchmarks/collection.py --base MODEL [--out benchmarks/results/NAME.json]

Three bare passes over the same batches, none of them with weight gradients:

    bare       the base model, loss as transformers computes it on the response tokens, gradients of activations down to
               the embeddings (what any per-example method pays at least)
    bare head  the same with this package's chunked head on response positions only, and the backward pass ending at the
               lowest adapted layer: the collection without its taps, the strictest bar
    PEFT       the bare pass of a PeftModel that carries the utility adapter

Runs are interleaved; each repetition's ratio is taken within the repetition, and the median is reported. Peak memory is
the resident set's maximum of a fresh process per variant, less the resident set after loading (Linux only).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from sstmerge.adapters import CoreSpace, load_adapter
from sstmerge.fisher import Batch, collect_fisher
from sstmerge.fisher.head import Head, label_scores
from sstmerge.fisher.taps import frozen
from sstmerge.pipeline.calibration import CollectionOptions, batches_of
from sstmerge.pipeline.evaluate import write_json
from sstmerge.pipeline.models import load_model, load_tokenizer
from sstmerge.prompts import load_examples

DATA = Path(__file__).resolve().parent.parent / "sstmerge" / "data"


@contextmanager
def embeddings_require_grad(model):
    handle = model.get_input_embeddings().register_forward_hook(lambda m, i, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def bare(model, batches: list[Batch]) -> None:
    with frozen(model), embeddings_require_grad(model):
        for batch in batches:
            labels = torch.where(batch.loss_mask, batch.input_ids, -100)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
            )
            loss.backward()


def bare_head(model, batches: list[Batch]) -> None:
    head = Head(model)
    with frozen(model), _first_layer_requires_grad(model):
        for batch in batches:
            captured: list[torch.Tensor] = []
            with head.capturing(captured):
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            predicts = torch.zeros_like(batch.loss_mask)
            predicts[:, :-1] = batch.loss_mask[:, 1:]
            hidden = captured[0][predicts]
            labels = batch.input_ids[:, 1:][batch.loss_mask[:, 1:]]
            weight = torch.ones(len(labels))
            gradients = label_scores(head, hidden, lambda p, rows, y=labels: y[rows][None], weight)
            hidden.backward(gradients[0])


@contextmanager
def _first_layer_requires_grad(model):
    anchor = torch.zeros((), requires_grad=True)
    projections = [m for name, m in model.named_modules() if ".layers.0." in name and isinstance(m, torch.nn.Linear)]
    handles = [m.register_forward_hook(lambda m, i, output: output + anchor.to(output.dtype)) for m in projections]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def variants(base: str, limit: int) -> dict[str, Callable[[], None]]:
    model, tokenizer = load_model(base), load_tokenizer(base)
    options = CollectionOptions()
    examples = load_examples(str(DATA / "benign.jsonl"), split="calibration", limit=limit)
    batches = batches_of(model, tokenizer, examples, options)
    adapters = [load_adapter(DATA / "adapters" / name, name=name) for name in ("utility", "safety")]
    space = CoreSpace.of(adapters)

    def collect(structure: str, reference: str, labels: str = "sampled") -> Callable[[], None]:
        return lambda: (
            collect_fisher(model, batches, space, structure=structure, labels=labels, reference=reference) and None
        )

    def peft_pass() -> None:
        bare(peft_model(), batches)

    cached: dict[str, torch.nn.Module] = {}

    def peft_model():
        if "peft" not in cached:
            from peft import PeftModel

            other = load_model(base)
            cached["peft"] = PeftModel.from_pretrained(other, DATA / "adapters" / "utility").to(other.dtype).eval()
        return cached["peft"]

    return {
        "bare": lambda: bare(model, batches),
        "bare head": lambda: bare_head(model, batches),
        "PEFT": peft_pass,
        **{
            f"{structure} at {reference}": collect(structure, reference)
            for structure in ("diagonal", "kfac", "global", "block")
            for reference in ("base", "utility")
        },
        "tokens": lambda: print(sum(int(b.attention_mask.sum()) for b in batches)),
    }


def peak(base: str, limit: int, name: str, queue) -> None:
    """Put the growth of the resident set's maximum into the queue, in KiB (Linux)."""
    runs = variants(base, limit)
    # ru_maxrss survives exec, so it would show the parent's maximum; the kernel's high-water mark can be reset.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    runs[name]()
    queue.put(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs = variants(arguments.base, arguments.limit)
    runs.pop("tokens")
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repetitions):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ratios = {
        bar: {
            name: statistics.median(t / b for t, b in zip(times, seconds[bar], strict=True))
            for name, times in seconds.items()
        }
        for bar in ("bare", "bare head", "PEFT")
    }
    memory = {}
    if not arguments.no_memory:
        context = multiprocessing.get_context("spawn")
        for name in ("bare", "bare head", "kfac at base", "kfac at utility", "global at base", "global at utility"):
            queue = context.Queue()
            process = context.Process(target=peak, args=(arguments.base, arguments.limit, name, queue))
            process.start()
            memory[name] = queue.get() / 1024
            process.join()
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "model": Path(arguments.base).name,
        "seconds": seconds,
        "ratios": ratios,
        "peak_memory_mib": memory,
    }
    print(json.dumps({"ratios": ratios, "peak_memory_mib": memory}, indent=2))
    if arguments.out:
        write_json(result, arguments.out)


if __name__ == "__main__":
    main()
