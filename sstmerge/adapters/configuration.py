"""`adapter_config.json`: what a configuration may hold, what sstmerge does not merge, and each layer's rank and scaling."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from sstmerge.errors import AdapterError
from sstmerge.untrusted import read_json

CONFIG_FILE = "adapter_config.json"
# PEFT re-derives the base weights when it loads these, so that B A alone is not the weight change.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga")
_TEXTS = ("peft_type", "base_model_name_or_path", "task_type")
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Patterns of PEFT are regular expressions. Those whose matching may take exponential time are refused.
_LONGEST_PATTERN = 512
_MOST_REPETITIONS = 3
_REPETITION = re.compile(r"(?<!\\)(?:[*+]|\{\d*,?\d*\})")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)\s*[*+{]")


def read_config(path: Path, name: str) -> dict[str, Any]:
    """Read an adapter's configuration.

    Args:
        path: The file.
        name: The adapter's name, for messages.

    Returns:
        Its fields; those that sstmerge looks at have the types they should have.

    Raises:
        AdapterError: If it cannot be read, or a field has another type.
    """
    config = read_json(path, f"The {CONFIG_FILE} of adapter '{name}'", AdapterError)
    for key in _TEXTS:
        if not isinstance(config.get(key), str | None):
            _refuse_type(name, key, "text", config[key])
    for key in _PATTERNS:
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            _refuse_type(name, key, "an object of numbers by module name", pattern)
        for expression in pattern:
            _check_pattern(expression, f"{key} of adapter '{name}'")
    targets = config.get("target_modules")
    if not (
        isinstance(targets, str | None) or (isinstance(targets, list) and all(isinstance(t, str) for t in targets))
    ):
        _refuse_type(name, "target_modules", "text or a list of texts", targets)
    return config


def refuse_unsupported(config: Mapping[str, Any], tensors: Mapping[str, Any], name: str) -> None:
    """Refuse adapters whose weight change is more than B A.

    Args:
        config: Fields of the configuration.
        tensors: The adapter's tensors by name.
        name: Its name, for messages.

    Raises:
        AdapterError: If the adapter is of another kind than plain LoRA.
    """
    kind = config.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        raise AdapterError(f"Adapter '{name}' is of PEFT type {kind}; sstmerge merges LORA adapters only.")
    if config.get("use_dora") or any("lora_magnitude_vector" in key for key in tensors):
        raise AdapterError(
            f"Adapter '{name}' is a DoRA adapter (use_dora): its weight change is not B A, since it rescales the base "
            "weights. Retrain with use_dora=False, or merge it into the base model first."
        )
    saved = config.get("modules_to_save")
    if saved or config.get("trainable_token_indices"):
        raise AdapterError(
            f"Adapter '{name}' carries full copies of trained modules (modules_to_save={saved}, trainable_token_indices="
            f"{config.get('trainable_token_indices')}). They are no LoRA factors, so sstmerge does not merge them: "
            "retrain with LoRA on these modules, or fold them into the base model first."
        )
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise AdapterError(
            f"Adapter '{name}' trains biases (bias={config.get('bias')!r}, lora_bias={config.get('lora_bias')!r}), "
            "which sstmerge does not merge; retrain with bias='none' and lora_bias=False."
        )
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"Adapter '{name}' was initialised with '{init}', which changes the base weights too, so B A is not the "
            "whole change. Save it with PEFT's path_initial_model_for_weight_conversion to make it a plain LoRA."
        )
    for option in ("layer_replication", "target_parameters", "megatron_config", "alora_invocation_tokens"):
        if config.get(option):
            raise AdapterError(f"Adapter '{name}' uses {option}, which sstmerge does not support; retrain without it.")


def rank_and_scaling(path: str, config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Return the rank of a layer's factors and PEFT's scaling, as the configuration gives them.

    Args:
        path: Module path of the layer.
        config: Fields of the configuration.
        name: The adapter's name, for messages.

    Returns:
        The rank r, and alpha / r, or alpha / sqrt(r) for rsLoRA.

    Raises:
        AdapterError: If one of them is missing or no usable number.
    """
    rank = _pattern_value(config.get("rank_pattern"), path, config.get("r"))
    alpha = _pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha"))
    scaling = math.nan
    if type(rank) is int and type(alpha) in (int, float) and rank >= 1:
        try:
            scaling = float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
        except OverflowError:
            scaling = math.inf
    if not math.isfinite(scaling):
        raise AdapterError(
            f"The {CONFIG_FILE} of adapter '{name}' must give r >= 1 and a finite lora_alpha; for layer '{path}' it gives "
            f"r={rank!r:.40}, lora_alpha={alpha!r:.40}."
        )
    return rank, scaling


def _pattern_value(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the first entry whose key matches the end of the path, as PEFT does."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _check_pattern(expression: str, where: str) -> None:
    repetitions = len(_REPETITION.findall(expression))
    if (
        len(expression) > _LONGEST_PATTERN
        or repetitions > _MOST_REPETITIONS
        or (repetitions and _REPEATED_GROUP.search(expression))
    ):
        raise AdapterError(
            f"The key '{expression[:60]}' in the {where} is a regular expression that may take forever to match; name "
            f"the modules instead (at most {_MOST_REPETITIONS} repetitions, none of a group)."
        )
    try:
        re.compile(rf"(.*\.)?({expression})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"The key '{expression[:60]}' in the {where} is no regular expression: {error}.") from error


def _refuse_type(name: str, key: str, expected: str, found: Any) -> NoReturn:
    raise AdapterError(
        f"'{key}' in the {CONFIG_FILE} of adapter '{name}' must be {expected}, but is {found!r:.60}; the file is damaged."
    )
