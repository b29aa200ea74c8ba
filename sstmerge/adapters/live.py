"""The LoRA layers of a live `peft.PeftModel`, with the model's own parameters: what training needs."""

from __future__ import annotations

from torch import nn

from sstmerge.adapters.adapter import LoraFactors
from sstmerge.errors import AdapterError


def live_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[nn.Module, LoraFactors]]:
    """Return the linear LoRA layers of an adapter in a live model.

    Args:
        model: A `peft.PeftModel`.
        adapter_name: Name of the adapter.

    Returns:
        By path in the base model: the layer's module, and its factors, which are the model's parameters themselves.

    Raises:
        AdapterError: The model is no PEFT model, or has no plain linear LoRA layer of that adapter.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        raise AdapterError(f"Expected a peft.PeftModel, but got {type(model).__name__}.")
    layers: dict[str, tuple[nn.Module, LoraFactors]] = {}
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or adapter_name not in module.lora_A:
            continue
        A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        if A.dim() != 2 or module.use_dora.get(adapter_name, False):
            raise AdapterError(
                f"Layer '{path}' of adapter '{adapter_name}' is no plain linear LoRA layer (A B, no DoRA)."
            )
        layers[path] = (module, LoraFactors(A=A, B=B, scaling=float(module.scaling[adapter_name])))
    if not layers:
        raise AdapterError(
            f"The model holds the adapters {sorted(model.peft_config)}, but no layer of '{adapter_name}'."
        )
    return layers
