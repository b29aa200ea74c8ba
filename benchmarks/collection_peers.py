"""What a user would run instead of `collect_fisher`: the peers' collectors over the same model, batches and labels.

Every peer is imported where it is built, so that a missing one is a row with a reason and no error. Tested with dattri 0.3,
kronfluence 1.0, bergson 2.5, curvlinops 3.0. All take the labels of the data and the summed cross entropy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from collection_workload import TARGETS, Workload, labels_of, summed_loss
from torch import Tensor, nn

Call = Callable[[], object]
PROJECTION = 32


def dattri_logra(work: Workload) -> Call:
    """Build LoGra's hook on the base model's layers: random projections of both sides to 32 dimensions."""
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    model = work.load().eval().requires_grad_(False)
    names = [name for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in TARGETS]
    for name in names:  # the hook returns no weight gradient; no other weight requires one either
        model.get_submodule(name).weight.requires_grad_(True)
    options = {"proj_dim": PROJECTION, "proj_max_batch_size": 64, "proj_type": "normal", "device": "cpu"}
    identity = {"proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity", "device": "cpu"}
    first = work.batches[0]
    sample = {"input_ids": first.input_ids, "attention_mask": first.attention_mask}
    compressors = setup_model_compressors(model, names, options, identity, sample)
    hooks = HookManager(model, names)
    hooks.set_compressors(compressors)

    def run() -> list[list[Tensor]]:
        # The attributor keeps the projected gradients of every batch, and so does this.
        kept = []
        for batch in work.batches:
            summed_loss(model, batch).backward()
            model.zero_grad()
            kept.append([gradient.detach() for gradient in hooks.get_compressed_grads()])
        return kept

    return run


# ---- kronfluence -----------------------------------------------------------------------------------------------------


def kronfluence_covariance(work: Workload) -> Call:
    """Build K-FAC's pass: activation and gradient covariances of lora_A and lora_B."""
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader

    options, _ = _kronfluence(work)
    return lambda: fit_covariance_matrices_with_loader(**options)


def kronfluence_lambda(work: Workload) -> Call:
    """Build EK-FAC's second pass: squared per-example gradients in the eigenbasis (here the identity: the work is equal)."""
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader

    options, layers = _kronfluence(work)
    eigen = {f"{side}_{what}": {} for side in ("activation", "gradient") for what in ("eigenvectors", "eigenvalues")}
    for name, layer in layers.items():
        for side, size in (("activation", layer.in_features), ("gradient", layer.out_features)):
            eigen[f"{side}_eigenvectors"][name] = torch.eye(size)
            eigen[f"{side}_eigenvalues"][name] = torch.ones(size)
    return lambda: fit_lambda_matrices_with_loader(eigen_factors=eigen, **options)


def _kronfluence(work: Workload) -> tuple[dict[str, Any], dict[str, nn.Linear]]:
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    model = work.fresh_peft_model()
    layers = _lora_linears(model)

    class LanguageModeling(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return summed_loss(model, SimpleNamespace(**batch))  # type: ignore[arg-type]

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(layers)

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch["attention_mask"]

    task = LanguageModeling()
    model = prepare_model(model, task)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    loader = [
        {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "loss_mask")} for batch in work.batches
    ]
    arguments = FactorArguments(use_empirical_fisher=True)
    options = {"model": model, "state": State(cpu=True), "task": task, "loader": loader, "factor_args": arguments}
    return {**options, "disable_tqdm": True}, layers


# ---- bergson ---------------------------------------------------------------------------------------------------------


def bergson_covariance(work: Workload) -> Call:
    """Build K-FAC's pass: activation and gradient covariances of lora_A and lora_B."""
    from bergson.hessians.kfac import CovarianceCollector

    return _bergson(
        work,
        lambda model, names, folder: CovarianceCollector(
            model=model, target_modules=names, path=folder, dtype=torch.float32
        ),
    )


def bergson_lambda(work: Workload) -> Call:
    """Build EK-FAC's second pass: squared per-example gradients in the eigenbasis (here the identity: the work is equal)."""
    from bergson.hessians.eigenvectors import LambdaCollector

    def collector(model: nn.Module, names: set[str], folder: str) -> Any:
        layers = {name: model.get_submodule(name) for name in names}
        sides = (
            {name: torch.eye(layer.in_features) for name, layer in layers.items()},
            {name: torch.eye(layer.out_features) for name, layer in layers.items()},
        )
        return LambdaCollector(model=model, target_modules=names, path=folder, eigenvectors=sides)

    return _bergson(work, collector)


def _bergson(work: Workload, make: Callable[[nn.Module, set[str], str], Any]) -> Call:
    model = work.fresh_peft_model()
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    inner = model.base_model
    collector = make(inner, set(_lora_linears(inner)), tempfile.mkdtemp())

    def run() -> None:
        for batch in work.batches:
            mask = batch.attention_mask.bool()
            mask[:, -1] = False
            with collector.with_batch(mask):
                summed_loss(model, batch).backward()

    return run


# ---- curvlinops, torch.func ------------------------------------------------------------------------------------------


def curvlinops_kfac(work: Workload) -> Call:
    """Build the K-FAC operator's factors for lora_A and lora_B, empirical Fisher."""
    from curvlinops import KFACLinearOperator

    model = work.fresh_peft_model()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, data: Any) -> Tensor:
            logits = self.model(**data, use_cache=False).logits[:, :-1]
            return logits.float().transpose(1, 2)  # (B, vocabulary, S), as CrossEntropyLoss has it

    data = [
        ({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}, labels_of(batch)[:, 1:])
        for batch in work.batches
    ]
    count = sum(len(batch.index) for batch in work.batches)
    operator = KFACLinearOperator(
        Logits(),
        nn.CrossEntropyLoss(reduction="sum"),
        parameters,
        data,
        check_deterministic=False,
        fisher_type="empirical",
        num_data=count,
        num_per_example_loss_terms=work.batches[0].input_ids.shape[1] - 1,
        batch_size_fn=lambda inputs: len(inputs["input_ids"]),
    )
    return operator.compute_kronecker_factors


def per_example_gradients(work: Workload) -> Call:
    """Build vmap(grad) over the LoRA weights: the squares of whole per-example gradients."""
    from torch.func import functional_call, grad, vmap

    model = work.fresh_peft_model()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def loss(weights: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(model, (weights, fixed), kwargs={"input_ids": ids[None], "use_cache": False}).logits
        return nn.functional.cross_entropy(logits[0, :-1].float(), labels[1:], reduction="sum", ignore_index=-100)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))

    def run() -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(weight) for name, weight in trained.items()}
        for batch in work.batches:
            for name, gradient in gradients(trained, batch.input_ids, labels_of(batch)).items():
                sums[name] += gradient.square().sum(dim=0)
        return sums

    return run


def _lora_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (".lora_A." in name or ".lora_B." in name)
    }


# Row, what the object is, whether it runs on the PEFT model, and how it is built.
PEERS: tuple[tuple[str, str, Callable[[Workload], Call]], ...] = (
    ("dattri LoGra hook", "per-example gradients of the base weights, 32 x 32 random projections", dattri_logra),
    ("kronfluence K-FAC", "input and gradient covariances of lora_A and lora_B", kronfluence_covariance),
    ("kronfluence EK-FAC, second pass", "squares of per-example gradients of lora_A and lora_B", kronfluence_lambda),
    ("bergson K-FAC", "input and gradient covariances of lora_A and lora_B", bergson_covariance),
    ("bergson EK-FAC, second pass", "squares of per-example gradients of lora_A and lora_B", bergson_lambda),
    ("curvlinops K-FAC", "input and gradient covariances of lora_A and lora_B", curvlinops_kfac),
    ("torch.func", "squares of per-example gradients of lora_A and lora_B", per_example_gradients),
)
