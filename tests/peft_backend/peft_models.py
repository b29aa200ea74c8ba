"""Small live PEFT models with random adapters, and PEFT's own function to compare with."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

FACTOR_TYPES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
DENSE_TYPES = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
PEFT_TYPES = (*FACTOR_TYPES, "cat", "svd", *DENSE_TYPES)
PEFTS_OWN = LoraModel.add_weighted_adapter


class Network(nn.Module):
    """Two linear layers, an embedding and convolutions, in the reach of one adapter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(23, 20)
        self.first = nn.Linear(20, 36)
        self.second = nn.Linear(36, 20)
        self.conv1 = nn.Conv1d(20, 12, 3)
        self.conv3 = nn.Conv3d(3, 12, 2)
        self.conv2 = nn.Conv2d(3, 12, 3)
        self.pointwise = nn.Conv2d(3, 12, 1)
        self.head = nn.Linear(20, 5)

    def forward(self, ids):
        return self.head(self.second(torch.relu(self.first(self.embedding(ids)))))


LINEAR = ("first", "second")


def config(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(LINEAR), "init_lora_weights": False} | changes)


def build(*changes, dtype=torch.float32, seed=0, autocast=False):
    """Return a PEFT model whose adapters a0, a1, … have random factors; one dictionary of changes for each."""
    torch.manual_seed(seed)
    base = Network().to(dtype).eval()
    model = get_peft_model(base, config(**changes[0]), adapter_name="a0", autocast_adapter_dtype=autocast)
    for number, change in enumerate(changes[1:], start=1):
        model.add_adapter(f"a{number}", config(**change), autocast_adapter_dtype=autocast)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def names(model):
    return sorted(model.peft_config)


def pefts(model, *arguments, **options):
    """Return a copy of the model in which PEFT's own function has been called."""
    other = copy.deepcopy(model)
    PEFTS_OWN(other.base_model, *arguments, **options)
    return other


def lora_layers(model):
    return {path: m for path, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def factors(layer, name):
    """Return A (r, d_in) and B (d_out, r), float64."""
    if name in layer.lora_A:
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    else:
        A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return A.detach().double().flatten(1), B.detach().double().flatten(1)


def deltas(model, name):
    """Return scaling · B A of every layer that an adapter has, float64."""
    found = {}
    for path, layer in lora_layers(model).items():
        if name in layer.lora_A or name in layer.lora_embedding_A:
            A, B = factors(layer, name)
            found[path] = layer.scaling[name] * (B @ A)
    return found


def worst(ours, theirs):
    """Return the largest relative Frobenius error over layers."""
    assert ours.keys() == theirs.keys()
    assert ours
    return max(float((ours[p] - theirs[p]).norm() / theirs[p].norm().clamp_min(1e-30)) for p in ours)


def snapshot(model):
    """Return everything that a failed call must leave alone."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "requires_grad": {key: p.requires_grad for key, p in model.named_parameters()},
        "training": {key: m.training for key, m in model.named_modules()},
        "configs": {key: copy.deepcopy(c.to_dict()) for key, c in model.peft_config.items()},
        "active": list(model.active_adapters),
        "targeted": list(model.base_model.targeted_module_names),
        "scalings": {path: dict(m.scaling) for path, m in lora_layers(model).items()},
        "buffers": {key: b.clone() for key, b in model.named_buffers()},
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for key in ("requires_grad", "training", "configs", "active", "targeted", "scalings"):
        assert after[key] == before[key], key
    for key in ("state", "buffers"):
        assert after[key].keys() == before[key].keys()
        assert all(torch.equal(after[key][k], v) for k, v in before[key].items())
