"""A new adapter in a live model: its configuration, its injection by PEFT, and the way back if anything fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from sstmerge.errors import AdapterError
from sstmerge.peft_drop_in.compatibility import merged_copies
from sstmerge.peft_drop_in.layers import Layer, parts_of
from sstmerge.peft_drop_in.merging import factor_dtype, merged_bias
from sstmerge.peft_drop_in.request import Request

# What a layer of the new adapter is made of; None where no adapter changes it.
LayerMerge = Callable[[Layer], tuple[Tensor, Tensor] | None]


def new_config(request: Request, rank: int) -> LoraConfig:
    """Return the configuration of the merged adapter: that of the first adapter, with scaling 1 and one rank everywhere.

    Args:
        request: The request.
        rank: Rank of the new adapter.

    Returns:
        The configuration; it targets exactly the layers that some of the adapters have.

    Raises:
        AdapterError: No configuration does.
    """
    configs: list[Any] = [request.tuner.peft_config[name] for name in request.adapters]
    saved = [module for config in configs for module in config.modules_to_save or ()]
    first = configs[0]
    changes: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,  # its scaling would be √r
        "modules_to_save": list(dict.fromkeys(saved)) or first.modules_to_save,
    }
    if isinstance(first.init_lora_weights, str) and first.init_lora_weights != "gaussian":
        changes["init_lora_weights"], changes["eva_config"] = (
            True,
            None,
        )  # it reads data or weights, and is not to run again
    if any(getattr(config, "lora_bias", False) for config in configs):
        changes["lora_bias"] = True
    wanted = {layer.path for layer in request.layers if not layer.inside_another}
    narrowing = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    for targets, more in (
        (_united_targets(configs), {}),
        (sorted(wanted), narrowing),
        ("|".join(f"({_escaped(path)})" for path in sorted(wanted)), narrowing),
    ):
        if targets is not None:
            config: LoraConfig = replace(first, target_modules=targets, **{**changes, **more})
            if {path for path in request.parts.paths if check_target_module_exists(config, path)} == wanted:
                return config
    raise AdapterError(
        f"No target_modules describe exactly the layers of the adapters {list(request.adapters)}: {sorted(wanted)}, beside "
        f"modules_to_save={changes['modules_to_save']}. Merge adapters that agree on what is adapted and what is copied."
    )


def insert(request: Request, config: LoraConfig, merge: LayerMerge) -> None:
    """Add the merged adapter to the model; if anything fails, leave the model as it was.

    Args:
        request: The request.
        config: Its configuration.
        merge: Makes the factors of a layer. Called after PEFT has drawn the initial weights, in PEFT's order of layers.
    """
    tuner, name = request.tuner, request.name
    with _all_or_nothing(request):
        tuner.peft_config[name] = config
        tuner.inject_adapter(tuner.model, name)
        for layer in request.layers:
            _fill(request, layer, merge(layer))
        for wrapper, owner in merged_copies(request):
            weight = request.weights[request.adapters.index(owner)]
            _fill_copy(wrapper.modules_to_save[name], wrapper.modules_to_save[owner], wrapper.original_module, weight)
        for wrapper in request.parts.auxiliary.values():
            for parameter_name, parameter in wrapper.named_parameters():
                if f".{name}." in f".{parameter_name}.":
                    parameter.requires_grad_(False)


def _fill(request: Request, layer: Layer, factors: tuple[Tensor, Tensor] | None) -> None:
    if factors is None:
        A, B = layer.factors(request.name).A, layer.factors(request.name).B
        dtype = factor_dtype(request, layer)
        factors = torch.zeros_like(A, dtype=dtype), torch.zeros_like(B, dtype=dtype)
    layer.write(request.name, *factors, merged_bias(request, layer))
    for part in (layer.module.lora_A, layer.module.lora_B, layer.module.lora_dropout):
        if request.name in part:
            part[request.name].train(layer.module.training)  # PEFT leaves new dropout layers in training mode
    for parameter in (*layer.parameters(request.name), layer.bias(request.name)):
        if parameter is not None:
            parameter.requires_grad_(False)


def _fill_copy(new: nn.Module, trained: nn.Module, original: nn.Module, weight: float) -> None:
    """Set a module to W + w (M − W), where M is an adapter's trained copy of it."""
    base = original.state_dict()
    values = {}
    for key, value in trained.state_dict().items():
        if weight == 1.0 or not value.is_floating_point():
            values[key] = value
        else:
            wide = torch.promote_types(value.dtype, torch.float32)
            values[key] = torch.lerp(base[key].to(wide), value.to(wide), weight).to(value.dtype)
    new.to(next(iter(trained.parameters())).dtype).load_state_dict(values)
    new.train(trained.training)


def _united_targets(configs: Sequence[Any]) -> str | set[str] | None:
    """Return the union of the adapters' target modules as PEFT forms it; None for a mixture of names and patterns."""
    targets = [config.target_modules for config in configs]
    if all(isinstance(target, str) for target in targets):
        return "|".join(f"({target})" for target in targets)
    if any(isinstance(target, str) or target is None for target in targets):
        return None
    return set().union(*targets)


def _escaped(path: str) -> str:
    return path.replace(".", r"\.")


@contextmanager
def _all_or_nothing(request: Request) -> Iterator[None]:
    """Keep trainability as it is in any case, and on failure take the new adapter out again."""
    tuner, name = request.tuner, request.name
    trainable = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    active = list(tuner.active_adapters)
    targeted = {key: list(getattr(tuner, key, ())) for key in ("targeted_module_names", "targeted_parameter_names")}
    try:
        yield
    except BaseException:
        parts = parts_of(tuner)
        for layer in parts.layers:
            layer.module.delete_adapter(name)
        for wrapper in parts.auxiliary.values():
            wrapper.delete_adapter(name, active)
        tuner.peft_config.pop(name, None)
        tuner.set_adapter(active)
        for key, value in targeted.items():
            if hasattr(tuner, key):
                setattr(tuner, key, value)
        raise
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
