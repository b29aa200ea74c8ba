"""Whether adapters of a live model can be merged: the cases in which PEFT is silently wrong are refused here, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor

from sstmerge.errors import AdapterError
from sstmerge.peft_drop_in.layers import Layer
from sstmerge.peft_drop_in.request import DENSE_TYPES, FACTOR_TYPES, SUMS, Request

# These change the base weights when they run, so that B A is not the whole weight change.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REFUSED_OPTIONS = {
    "use_dora": "its weight change is not B A, since it rescales the base weights",
    "kasa_config": "it truncates the base weights",
    "arrow_config": "it routes between adapters at run time",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "its factors act on pooled inputs",
    "velora_config": "its forward pass is not B A",
    "monteclora_config": "its factors are random",
    "megatron_config": "its layers are split over devices by Megatron",
    "layer_replication": "a new adapter would replicate the layers once more",
}


def check_adapters(request: Request) -> None:
    """Check that the adapters of a request can be merged as asked.

    Args:
        request: The request.

    Raises:
        AdapterError: They cannot; the message names the adapter, the layer and the reason.
    """
    for name in request.adapters:
        _check_config(request, name)
    _check_modules_to_save(request)
    _check_trainable_tokens(request)
    for layer in request.layers:
        _check_layer(request, layer)


def merged_copies(request: Request) -> Iterator[tuple[ModulesToSaveWrapper, str]]:
    """Yield every `modules_to_save` wrapper that one of the adapters has a trained copy in, with that adapter.

    Args:
        request: The request.

    Yields:
        Wrapper and adapter.
    """
    for module in request.parts.auxiliary.values():
        if isinstance(module, ModulesToSaveWrapper):
            for name in dict.fromkeys(request.adapters):
                if name in module.modules_to_save:
                    yield module, name


def _check_config(request: Request, name: str) -> None:
    config: Any = request.tuner.peft_config[name]
    if getattr(config, "target_parameters", None):
        raise AdapterError(
            f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{name}'): the adapter "
            f"uses target_parameters={config.target_parameters}. Merge it into the base model, or retrain with "
            "target_modules."
        )
    for option, reason in _REFUSED_OPTIONS.items():
        if getattr(config, option, None):
            raise AdapterError(f"Adapter '{name}' uses {option}: {reason}. It cannot be merged; retrain without it.")
    init = str(config.init_lora_weights).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"Adapter '{name}' was initialised with '{init}', which changes the base weights too, so that B A is not the "
            "whole change. Make it a plain LoRA first: save_pretrained(path_initial_model_for_weight_conversion=…), then "
            "load that."
        )
    if config.bias != "none":
        raise AdapterError(
            f"Adapter '{name}' was trained with bias='{config.bias}': these biases are part of the base model, shared by "
            "all adapters, and cannot be weighted. Retrain with bias='none'."
        )
    if getattr(config, "target_modules_to_tie", None):
        raise AdapterError(
            f"Adapter '{name}' shares factors between tied layers (ensure_weight_tying); merged factors would come apart. "
            "Retrain without it."
        )
    if getattr(config, "lora_bias", False) and request.kind not in SUMS:
        raise AdapterError(
            f"Adapter '{name}' has biases in lora_B (lora_bias), which combination_type '{request.kind}' says nothing "
            f"about. They are merged by {', '.join(SUMS)}."
        )
    first: Any = request.tuner.peft_config[request.adapters[0]]
    tokens = [getattr(c, "alora_invocation_tokens", None) for c in (first, config)]
    if tokens[0] != tokens[1]:
        raise AdapterError(
            f"Adapter '{request.adapters[0]}' is invoked by the tokens {tokens[0]} but adapter '{name}' by {tokens[1]} "
            "(alora_invocation_tokens); only adapters that are active at the same positions can be merged."
        )


def _check_modules_to_save(request: Request) -> None:
    owners: dict[int, set[str]] = {}
    for wrapper, name in merged_copies(request):
        owners.setdefault(id(wrapper), set()).add(name)
    shared = [names for names in owners.values() if len(names) > 1]
    if shared:
        raise AdapterError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s). The adapters {sorted(shared[0])} each have a full copy of the same module."
        )


def _check_trainable_tokens(request: Request) -> None:
    """Refuse trained token embeddings; rows that were never trained are lost without harm."""
    for path, module in request.parts.auxiliary.items():
        if not isinstance(module, TrainableTokensWrapper):
            continue
        tokens = module.token_adapter
        for name in request.adapters:
            if name not in tokens.trainable_tokens_delta:
                continue
            rows, originals = tokens.trainable_tokens_delta[name], tokens.trainable_tokens_original[name]
            if not torch.equal(rows.detach().to(originals), originals):
                raise AdapterError(
                    f"Adapter '{name}' has trained token embeddings in '{path}' (trainable_token_indices), which a merge of "
                    "LoRA factors would lose. Retrain without them, or merge the adapter into the base model."
                )


def _check_layer(request: Request, layer: Layer) -> None:
    present = [request.adapters[index] for index in layer.members(request.adapters)]
    merged = list(layer.module.merged_adapters)
    if merged:
        raise AdapterError(
            f"The adapters {merged} are merged into the base weights at the moment (layer '{layer.path}'); call "
            "model.unmerge_adapter() first."
        )
    for name in present:
        variant = getattr(layer.module, "lora_variant", {}).get(name)
        if variant is not None and not type(variant).__name__.startswith("ALora"):
            raise AdapterError(
                f"Layer '{layer.path}' of adapter '{name}' is of the LoRA variant {type(variant).__name__}, whose weight "
                "change is not B A; it cannot be merged."
            )
        for label, tensor in zip(("lora_A", "lora_B"), layer.parameters(name), strict=True):
            _check_tensor(tensor, f"'{layer.path}.{label}' of adapter '{name}'")
    _check_shapes(request, layer, present)


def _check_tensor(tensor: Tensor, where: str) -> None:
    if tensor.device.type == "meta":
        raise AdapterError(f"{where} is on the meta device and has no numbers yet; load the adapter's weights first.")
    if not tensor.is_floating_point():
        raise AdapterError(f"{where} must hold floating-point numbers, but has dtype {tensor.dtype}.")
    if not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor.detach())):
        raise AdapterError(f"{where} holds NaN or Inf; the training diverged or the file is damaged.")


def _check_shapes(request: Request, layer: Layer, present: Sequence[str]) -> None:
    ranks = {name: layer.factors(name).rank for name in present}
    kind = request.kind
    if kind in FACTOR_TYPES and len(set(ranks.values())) > 1:
        raise AdapterError(
            f"All adapters must have the same r value when using combination_type {', '.join(FACTOR_TYPES)}, which add "
            f"lora_A and lora_B apart; layer '{layer.path}' has {ranks}. Use 'svd', 'cat' or one of {list(DENSE_TYPES)}."
        )
    if layer.groups > 1 and kind not in FACTOR_TYPES:
        raise AdapterError(
            f"Layer '{layer.path}' is a convolution of {layer.groups} groups, whose weight change is not B A; "
            f"combination_type '{kind}' cannot merge it. Use one of {list(FACTOR_TYPES)}."
        )
    if kind in ("ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"):
        sizes = {"its weight change": layer.factors(present[0]).B.shape[0] * layer.factors(present[0]).A.shape[1]}
        if kind in FACTOR_TYPES:
            sizes = dict(zip(("lora_A", "lora_B"), (t.numel() for t in layer.parameters(present[0])), strict=True))
        for label, size in sizes.items():
            if int(request.density * size) == 0:
                raise AdapterError(
                    f"density {request.density} keeps none of the {size} entries of {label} in layer '{layer.path}'; the "
                    f"merged adapter would be zero there. Give a density above {1 / size:.2g}."
                )
