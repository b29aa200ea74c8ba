"""Small adapters, batches and dense oracles that several tests share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.fisher import Batch, Fisher, collect_fisher
from sstmerge.gevp import solve
from sstmerge.pipeline.calibration import CollectionOptions
from sstmerge.pipeline.fisher_job import collect_file
from sstmerge.pipeline.models import load_model, load_tokenizer

VOCABULARY = 100
LLAMA_TARGETS = ("q_proj", "v_proj", "down_proj")
GPT2_TARGETS = ("c_attn", "c_fc")


def linear_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the shape (d_out, d_in) of every module whose last name is one of `targets`."""
    shapes = {}
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in targets:
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T  # Conv1D is transposed
            shapes[path] = (weight.shape[0], weight.shape[1])
    return shapes


def random_adapter(
    model: nn.Module,
    name: str = "adapter",
    *,
    targets: Sequence[str] = LLAMA_TARGETS,
    rank: int = 2,
    scaling: float = 0.5,
    size: float = 0.3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    base_model: str | None = None,
) -> Adapter:
    """Return an adapter with factors from N(0, size²) on all target modules."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    layers = {
        path: LoraFactors(A=draw(rank, d_in), B=draw(d_out, rank), scaling=scaling)
        for path, (d_out, d_in) in linear_layers(model, targets).items()
    }
    return Adapter(name, layers, base_model=base_model, config={"target_modules": sorted(targets)})


def regauged(adapter: Adapter, condition: float, seed: int = 0) -> Adapter:
    """Return the same weight changes from other factors, B N and N⁻¹ A with cond(N) = condition."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, factors in adapter.layers.items():
        r = factors.rank
        left, right = (torch.linalg.qr(torch.randn(r, r, generator=generator).double()).Q for _ in range(2))
        N = left @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10().item(), r).double()) @ right
        layers[path] = LoraFactors(A=torch.linalg.solve(N, factors.A), B=factors.B @ N, scaling=factors.scaling)
    return Adapter(adapter.name, layers, base_model=adapter.base_model, config=adapter.config)


def random_batch(
    lengths: Sequence[int],
    *,
    response: int | Sequence[int] = 3,
    seed: int = 0,
    weight: Sequence[float] | None = None,
    first_index: int = 0,
    width: int | None = None,
) -> Batch:
    """Return right-padded random sequences; the last `response` tokens of each are its response."""
    generator = torch.Generator().manual_seed(seed)
    size, width = len(lengths), width or max(lengths)
    responses = [response] * size if isinstance(response, int) else response
    input_ids = torch.zeros(size, width, dtype=torch.int64)
    position = torch.arange(width)
    attention_mask = (position < torch.tensor(lengths)[:, None]).long()
    loss_mask = attention_mask.bool() & (position >= (torch.tensor(lengths) - torch.tensor(responses))[:, None])
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(4, VOCABULARY, (length,), generator=generator)
    return Batch(
        input_ids,
        attention_mask,
        loss_mask,
        torch.arange(first_index, first_index + size),
        torch.tensor(weight if weight is not None else [1.0] * size, dtype=torch.float32),
    )


def rows(batch: Batch, index: slice | Sequence[int], width: int | None = None) -> Batch:
    """Return some sequences of a batch, cut or padded to another width."""
    chosen = list(range(len(batch.index)))[index] if isinstance(index, slice) else list(index)
    width = width or int(batch.attention_mask[chosen].sum(dim=1).max())

    def cut(tensor: Tensor) -> Tensor:
        missing = max(0, width - tensor.shape[1])
        return torch.nn.functional.pad(tensor[chosen, :width], (0, missing))

    return Batch(
        cut(batch.input_ids),
        cut(batch.attention_mask),
        cut(batch.loss_mask),
        batch.index[chosen],
        batch.weight[chosen],
    )


def enumerated_labels(model: nn.Module, space: CoreSpace, core: Tensor, prompts: Sequence[Tensor]) -> list[Batch]:
    """Return, for single-token responses, one sequence for every label y, with weight p(y | prompt) at the point.

    A Fisher of labels="data" on these batches is the exact expectation over labels. Indices alternate, prompt by prompt.
    """
    batches = []
    for number, prompt in enumerate(prompts):
        weights = dense_weights(model, space, core)
        with torch.no_grad():
            logits = functional_call(model, weights, kwargs={"input_ids": prompt[None]}, tie_weights=False).logits
        ids = torch.cat([prompt.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
        loss_mask = torch.zeros_like(ids, dtype=torch.bool)
        loss_mask[:, -1] = True
        index = torch.full((VOCABULARY,), number)
        batches.append(
            Batch(ids, torch.ones_like(ids), loss_mask, index, logits[0, -1].double().softmax(dim=-1).float())
        )
    return batches


def dense_deltas(space: CoreSpace, vector: Tensor) -> dict[str, Tensor]:
    """Return U C Vᵀ of every layer, (d_out, d_in), float64."""
    deltas = {}
    for group, cores in zip(space.groups, space.split(vector), strict=True):
        for j, path in enumerate(group.names):
            deltas[path] = group.U[j].double() @ cores[j].double() @ group.V[j].double().mT
    return deltas


def adapter_deltas(adapter: Adapter) -> dict[str, Tensor]:
    """Return s B A of every layer, (d_out, d_in), float64."""
    return {path: factors.delta() for path, factors in adapter.layers.items()}


def dense_weights(model: nn.Module, space: CoreSpace, core: Tensor) -> dict[str, Tensor]:
    """Return the weights W + U C Vᵀ by parameter name, differentiable with respect to the core."""
    modules = dict(model.named_modules())
    weights = {}
    for path, delta in dense_deltas(space, core).items():
        weight = modules[path].weight.detach()
        change = delta.to(weight.dtype)
        weights[f"{path}.weight"] = weight + (change if isinstance(modules[path], nn.Linear) else change.T)
    return weights


def log_likelihood(model: nn.Module, space: CoreSpace, core: Tensor, batch: Batch, row: int) -> Tensor:
    """Return log p(response | prompt) of one sequence without its padding, from densely changed weights."""
    length = int(batch.attention_mask[row].sum())
    ids, mask = batch.input_ids[row : row + 1, :length], batch.loss_mask[row, :length]
    weights = dense_weights(model, space, core)
    logits = functional_call(model, weights, kwargs={"input_ids": ids}, tie_weights=False).logits[0]
    token_log_p = logits[:-1].double().log_softmax(dim=-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return token_log_p[mask[1:]].sum()


def brute_force_scores(model: nn.Module, space: CoreSpace, core: Tensor, batch: Batch) -> Tensor:
    """Return Γ of every sequence, (n, D), by autograd through densely changed weights, one sequence at a time."""
    scores = []
    for row in range(len(batch.index)):
        point = core.clone().requires_grad_()
        scores.append(torch.autograd.grad(log_likelihood(model, space, point, batch, row), point)[0])
    return torch.stack(scores)


def layer_slices(space: CoreSpace) -> dict[str, slice]:
    """Return where each layer lies in a flat vector."""
    slices, offset = {}, 0
    for group in space.groups:
        _, rows_, columns = group.core_shape
        for path in group.names:
            slices[path] = slice(offset, offset + rows_ * columns)
            offset += rows_ * columns
    return slices


def dense_fisher(fisher: Fisher) -> Tensor:
    """Return the D x D matrix that a Fisher of any structure stands for."""
    space, dense = fisher.space, torch.zeros(fisher.space.size, fisher.space.size, dtype=torch.float64)
    if fisher.structure == "global":
        scores = fisher.statistics["scores"].double()  # a division in float32 would round, by 2e-5 after the solve
        return scores.mT @ scores / fisher.tokens
    if fisher.structure == "diagonal":
        return torch.diag(fisher.diagonal())
    slices = layer_slices(space)
    for i, group in enumerate(space.groups):
        for j, path in enumerate(group.names):
            where = slices[path]
            if fisher.structure == "block":
                dense[where, where] = fisher.blocks()[i][j]
            elif fisher.structure == "kfac":
                X, D = fisher.kronecker_factors()[i]
                dense[where, where] = torch.kron(D[j], X[j])  # vec is row-major: (o, i)
            else:
                basis = fisher.kronecker_basis()
                inverse = torch.kron(torch.linalg.inv(basis.Q[i][j]), torch.linalg.inv(basis.P[i][j]))
                dense[where, where] = inverse.mT @ torch.diag(fisher.diagonal()[where]) @ inverse
    return dense


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return the largest deviation in units of the largest expected entry."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., object]) -> Iterator[None]:
    """Call a forward hook on one module inside the block."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# ---- a utility and a safety adapter, and their Fishers ---------------------------------------------------------------

UTILITY, SAFETY = "utility", "safety"
HARM, BENIGN = random_batch([7] * 40, seed=1), random_batch([6] * 48, seed=2)


def utility_and_safety(model: nn.Module) -> list[Adapter]:
    """Return two adapters for a GPT-2 that share some layers; their space has more dimensions than HARM has rows."""
    return [
        random_adapter(model, UTILITY, targets=("c_attn",), rank=2, seed=2),
        random_adapter(model, SAFETY, targets=GPT2_TARGETS, rank=3, seed=1),
    ]


def gain_and_cost(model: nn.Module, space: CoreSpace, structure: str) -> list[Fisher]:
    """Return F_gain and F_cost at the utility model."""

    def pair(structure: str, **options: object) -> list[Fisher]:
        return [
            collect_fisher(model, [data], space, structure=structure, labels=labels, reference=UTILITY, **options)
            for data, labels in ((HARM, "data"), (BENIGN, "sampled"))
        ]

    if structure == "ekfac":
        return pair("ekfac", basis=solve(*pair("kfac")).basis)
    return pair(structure)


def write_peft_adapter(model, folder: Path, seed: int, rank: int, targets: list[str]) -> None:
    """Save an adapter as PEFT does; `model` is left as it was."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    peft_model.peft_config["default"].base_model_name_or_path = "pico/llama"
    peft_model.save_pretrained(folder)
    peft_model.unload()


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def collect_pair_files(
    job: dict[str, str],
    folder: Path,
    options: CollectionOptions = CollectionOptions(),  # noqa: B008 (frozen)
) -> dict[str, str]:
    """Collect the Fishers of the fixture `job` as files; returns `gain` and `cost`."""
    files = {"gain": folder / "gain.safetensors", "cost": folder / "cost.safetensors"}
    for name, data, labels in (("gain", "harm.jsonl", "data"), ("cost", "benign.jsonl", "sampled")):
        collect_file(
            lambda: (load_model(job["base"], device="cpu"), load_tokenizer(job["base"])),
            {role: job[role] for role in (UTILITY, SAFETY)},
            [job[data]],
            files[name],
            labels=labels,
            options=options,
        )
    return {name: str(path) for name, path in files.items()}
