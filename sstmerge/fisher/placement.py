"""Where a model's weights are, whoever put them there: accelerate's offload, FSDP2's shards, torch.compile's wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sstmerge.errors import InputError
from sstmerge.fisher.distributed import Ranks

# Set by bitsandbytes on 4-bit layers of a CPU that has a kernel for repacked weights.
_REPACKS = "support_avx512bf16_for_cpu"


def input_device(model: nn.Module) -> torch.device:
    """Return the device that token ids must be on.

    Args:
        model: A model, its weights on one device, spread over several, or offloaded by accelerate.

    Returns:
        The device of the input embedding (of the first parameter where there is none), or the one that its weights are
        brought to when they are needed.

    Raises:
        InputError: If the weights are nowhere.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    module = embedding if isinstance(embedding, nn.Module) else model
    first = next(module.parameters(), None)
    device = first.device if first is not None else next(model.parameters()).device
    if device.type != "meta":
        return device
    for owner in (module, *model.modules()):
        for hook in _offload_hooks(owner):
            place = getattr(hook, "execution_device", None)
            if isinstance(place, dict):  # one per input; the ids are the first
                place = next(iter(place.values()), None)
            if place is not None:
                return torch.device(place)
    raise InputError(
        "The model's weights are on the meta device and no hook brings them back; load the model with its weights."
    )


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of a model's base weights, sorted by name; adapters are left out.

    Weights that are offloaded are read from where they lie, and shards are put together: under FSDP all processes must
    call this together.

    Args:
        model: The model, or a `peft.PeftModel` of it.

    Yields:
        Name in the base model, and value.

    Raises:
        InputError: If a weight is nowhere.
    """
    owners = {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in model.named_modules()
        for name in module._parameters
    }
    for full_name, parameter in sorted(model.named_parameters(), key=lambda item: _plain(item[0])):
        if ".lora_" not in full_name:
            yield _plain(full_name), _value(*owners[full_name], parameter.detach())


def is_sharded(model: nn.Module) -> bool:
    """Return whether weights are spread over processes (FSDP2), so that a pass needs all of them together."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def refuse_shared_sharding(model: nn.Module, ranks: Ranks) -> None:
    """Refuse processes that are to share out batches although their model needs all of them for each.

    Args:
        model: The base model.
        ranks: The processes.

    Raises:
        InputError: If it is sharded over them.
    """
    if ranks.size > 1 and is_sharded(model):
        raise InputError(
            "The base model is sharded over the processes, so that each pass needs all of them, and they cannot share the "
            "batches out. Collect without ranks in all processes (all get the same result), or with an unsharded base."
        )


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from repacking 4-bit weights for inference while the block runs.

    On CPUs with bfloat16 instructions it does so at the first pass in evaluation mode, and no gradient flows through the
    kernel that reads the packed form: layers below it would silently get zeros.

    Args:
        model: The model.

    Yields:
        None.

    Raises:
        InputError: If weights have been repacked before.
    """
    modules = {name: module for name, module in model.named_modules() if getattr(module, _REPACKS, False)}
    for name, module in modules.items():
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError(
                f"bitsandbytes has repacked the 4-bit weights of '{name}' for inference on this CPU, and no gradient flows "
                f"through them. Load the model anew and set module.{_REPACKS} = False on its layers before it is used."
            )
    for module in modules.values():
        setattr(module, _REPACKS, False)
    try:
        yield
    finally:
        for module in modules.values():
            setattr(module, _REPACKS, True)


def never_repack(model: nn.Module) -> None:
    """Do for good what `differentiable` does for a block; for a model that is to answer prompts before it is measured."""
    for module in model.modules():
        if getattr(module, _REPACKS, False):
            setattr(module, _REPACKS, False)


def _plain(name: str) -> str:
    """Return a parameter's name without what PEFT and torch.compile put into it."""
    return name.replace("_orig_mod.", "").replace("base_model.model.", "").replace(".base_layer.", ".")


def _value(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    if hasattr(parameter, "full_tensor"):  # a DTensor, as FSDP2 makes them
        whole: Tensor = parameter.full_tensor()
        return whole
    if parameter.device.type != "meta":
        return parameter
    for hook in _offload_hooks(module):
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            stored: Tensor = weights[name]
            return stored
    raise InputError(
        f"The weight '{name}' is on the meta device and was not offloaded; load the model with its weights."
    )


def _offload_hooks(module: nn.Module) -> list[object]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook] if hook is not None else []))


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` wrapped, or the model itself."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run compiled modules as Python while the block runs.

    Code that was compiled before a hook was registered does not call the hook: the model would silently stay what it was.

    Args:
        model: The model, some or all of it compiled.

    Yields:
        None.
    """
    compiled = any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    with ExitStack() as stack:
        if compiled:  # only then, because it imports the compiler
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
