"""PEFT adapter directories, hub ids and live PEFT models: reading and writing.

Format: `adapter_config.json` beside `adapter_model.safetensors` with keys
`base_model.model.<path>.lora_A.weight` and `.lora_B.weight`. Only safetensors is read: pickled files can run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sstmerge.adapters.adapter import Adapter, LoraFactors, natural_order
from sstmerge.adapters.configuration import CONFIG_FILE, rank_and_scaling, read_config, refuse_unsupported
from sstmerge.atomic import atomic_directory
from sstmerge.errors import AdapterError
from sstmerge.untrusted import FLOATING_POINT, read_tensor_headers

T = TypeVar("T")
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
_PASSED_ON = ("task_type", "target_modules", "fan_in_fan_out")
# With one of these, target_modules alone would name more layers than were adapted.
_NARROWING = ("layers_to_transform", "exclude_modules")
_BASE_COPY = ".base_layer.weight"


def load_adapter(source: str | Path, *, name: str | None = None, revision: str | None = None) -> Adapter:
    """Read a LoRA adapter from a PEFT directory or a hub id.

    Args:
        source: Directory with `adapter_config.json` and `adapter_model.safetensors`, or a Hugging Face hub id.
        name: Name used in messages; the last component of `source` by default.
        revision: Hub revision; ignored for a directory.

    Returns:
        The adapter; its tensors are memory-mapped copies in the dtype of the file.

    Raises:
        AdapterError: If the files are missing or damaged, the adapter is not plain LoRA, or a tensor does not fit.
    """
    directory = _locate(source, revision)
    name = name or directory.name
    config = read_config(directory / CONFIG_FILE, name)
    tensors = _read_tensors(directory / WEIGHTS_FILE, name)
    refuse_unsupported(config, tensors, name)
    layers = {path: _factors(path, pair, config, name) for path, pair in _pair_factors(tensors, name).items()}
    adapter = Adapter(
        name=name,
        layers=layers,
        base_model=config.get("base_model_name_or_path") or None,
        config=_passed_on(config),
        source=str(source),
    )
    adapter.validate()
    return adapter


def adapter_from_model(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """Read a LoRA adapter out of a live `peft.PeftModel`.

    Args:
        model: The PEFT model; it is not changed.
        adapter_name: Name of the adapter in the model.

    Returns:
        The adapter; its tensors are detached copies on the CPU.

    Raises:
        AdapterError: If the model is no PEFT model, does not hold the adapter, or the adapter is not plain LoRA.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        raise AdapterError(f"Expected a peft.PeftModel, but got {type(model).__name__}; pass a directory or a hub id.")
    if adapter_name not in model.peft_config:
        raise AdapterError(f"The model holds the adapters {sorted(model.peft_config)}, but not '{adapter_name}'.")
    config = model.peft_config[adapter_name].to_dict()
    config = {key: value.value if hasattr(value, "value") else value for key, value in config.items()}
    layers: dict[str, LoraFactors] = {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_embedding_A:
            raise AdapterError(
                f"Adapter '{adapter_name}' adapts the embedding '{path}'; sstmerge merges linear layers only: retrain "
                "without this module in target_modules."
            )
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            layers[path] = LoraFactors(
                A=module.lora_A[adapter_name].weight.detach().cpu().clone(),
                B=module.lora_B[adapter_name].weight.detach().cpu().clone(),
                scaling=float(module.scaling[adapter_name]),
            )
    refuse_unsupported(config, {}, adapter_name)
    adapter = Adapter(
        name=adapter_name,
        layers=layers,
        base_model=config.get("base_model_name_or_path") or None,
        config=_passed_on(config),
        source="a live PeftModel",
    )
    adapter.validate()
    return adapter


def _passed_on(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a merged adapter inherits."""
    kept = {key: config[key] for key in _PASSED_ON if config.get(key) is not None}
    if any(config.get(key) not in (None, []) for key in _NARROWING):
        kept.pop("target_modules", None)
    elif isinstance(kept.get("target_modules"), list | set | frozenset):
        kept["target_modules"] = sorted(kept["target_modules"])
    return kept


def save_adapter(
    adapter: Adapter, directory: str | Path, *, overwrite: bool = False, extra_files: Mapping[str, str] | None = None
) -> Path:
    """Write an adapter as a PEFT directory that PEFT, transformers and vLLM-style loaders accept.

    The adapter must have one rank r and scaling 1 in every layer (what `CoreSpace.to_adapter` produces): it is written
    with `lora_alpha = r` and empty patterns, since not every loader knows `rank_pattern`.

    Args:
        adapter: The adapter.
        directory: Directory to create.
        overwrite: Replace the directory if it exists.
        extra_files: Text files written beside it, content by file name (such as a merge report).

    Returns:
        The directory.

    Raises:
        AdapterError: If ranks differ between layers or a scaling is not 1.
    """
    ranks = {factors.rank for factors in adapter.layers.values()}
    scalings = {factors.scaling for factors in adapter.layers.values()}
    if len(ranks) != 1 or scalings != {1.0}:
        raise AdapterError(
            f"Adapter '{adapter.name}' has ranks {sorted(ranks)} and scalings {sorted(scalings)}; only one rank with "
            "scaling 1 can be written. Bring it into a CoreSpace and write that back first."
        )
    rank = ranks.pop()
    tensors = {}
    for path in sorted(adapter.layers, key=natural_order):
        tensors[f"base_model.model.{path}.lora_A.weight"] = adapter.layers[path].A.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = adapter.layers[path].B.contiguous()
    config = _peft_config(adapter, rank)
    with atomic_directory(directory, overwrite=overwrite) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for file_name, content in (extra_files or {}).items():
            (temporary / file_name).write_text(content)
    return Path(directory)


def _peft_config(adapter: Adapter, rank: int) -> dict[str, Any]:
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(_target_modules(adapter)),
        task_type=adapter.config.get("task_type"),
        base_model_name_or_path=adapter.base_model,
        fan_in_fan_out=bool(adapter.config.get("fan_in_fan_out", False)),
        inference_mode=True,
    ).to_dict()
    config = {key: getattr(value, "value", value) for key, value in config.items()}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _target_modules(adapter: Adapter) -> list[str]:
    """Return suffixes where the inputs agreed on them, exact paths otherwise.

    PEFT puts an adapter on every module that ends with a suffix; exact paths keep it off layers nobody adapted.
    """
    suffixes = adapter.config.get("target_modules")
    return list(suffixes) if isinstance(suffixes, list | tuple) and suffixes else list(adapter.layers)


def _locate(source: str | Path, revision: str | None) -> Path:
    try:
        directory = Path(source).expanduser()
        is_directory, exists = directory.is_dir(), directory.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a null byte, the home of nobody
        raise AdapterError(f"'{source}' is neither a directory nor a hub id: {error}.") from error
    if is_directory:
        for required in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / required).is_file():
                pickled = required == WEIGHTS_FILE and (directory / "adapter_model.bin").is_file()
                raise AdapterError(
                    f"'{directory}' has no {required}."
                    + (
                        " It has a pickled adapter_model.bin, which sstmerge does not load because pickles can run "
                        "code: load it in PEFT and call save_pretrained(safe_serialization=True)."
                        if pickled
                        else " Give the directory that PEFT's save_pretrained wrote (adapters not named 'default' lie "
                        "in a subfolder)."
                    )
                )
        return directory
    if exists or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise AdapterError(f"'{source}' is neither a directory nor a hub id of the form owner/name.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        files = [hf_hub_download(str(source), filename, revision=revision) for filename in (CONFIG_FILE, WEIGHTS_FILE)]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise AdapterError(
            f"'{source}' is not a local directory, and could not be fetched from the hub: {error}"
        ) from error
    return Path(files[0]).parent


def _read_tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    what = f"{path} of adapter '{name}'"
    headers, _ = read_tensor_headers(path, what, AdapterError, dtypes=FLOATING_POINT)
    _pair_factors(headers, name)  # names are refused before any tensor is read
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in headers}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{what} is not a readable safetensors file: {error}.") from error


def _pair_factors(tensors: Mapping[str, T], name: str) -> dict[str, dict[str, T]]:
    """Return the entries of A and B by layer; the values may be tensors or only their headers."""
    pairs: dict[str, dict[str, T]] = {}
    for key, tensor in tensors.items():
        # PEFT writes the frozen base weights of an adapted output head beside its factors.
        if key.endswith(_BASE_COPY) and f"{key.removesuffix(_BASE_COPY)}.lora_A.weight" in tensors:
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"Adapter '{name}' holds the tensor '{key}', which is no LoRA factor of a linear layer; expected only "
                "names of the form base_model.model.<path>.lora_A.weight and .lora_B.weight."
            )
        pairs.setdefault(match["path"], {})[match["factor"]] = tensor
    for path, pair in pairs.items():
        if len(pair) != 2:
            missing = "B" if "A" in pair else "A"
            raise AdapterError(
                f"Layer '{path}' of adapter '{name}' lacks its lora_{missing}.weight: file is cut short."
            )
    return {path: pairs[path] for path in sorted(pairs, key=natural_order)}


def _factors(path: str, pair: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str) -> LoraFactors:
    rank, scaling = rank_and_scaling(path, config, name)
    if pair["A"].dim() == 2 and pair["A"].shape[0] != rank:
        raise AdapterError(
            f"'{path}.lora_A.weight' of adapter '{name}' has shape {tuple(pair['A'].shape)}, but {CONFIG_FILE} says "
            f"rank {rank} for this layer (r, rank_pattern); weights and configuration belong to different adapters."
        )
    return LoraFactors(A=pair["A"], B=pair["B"], scaling=scaling)
