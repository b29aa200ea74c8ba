"""Loading base models and tokenizers through transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from sstmerge.errors import InputError
from sstmerge.fisher.placement import never_repack
from sstmerge.ops import default_device

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("4bit", "8bit")
# Nothing of a model is ever executed: no code from its repository, no pickled weights.
_NO_CODE = {"trust_remote_code": False}
_SAFE_WEIGHTS = _NO_CODE | {"use_safetensors": True}
# What transformers and tokenizers raise for files they cannot make sense of.
_UNREADABLE = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    SafetensorError,
)
# Building a model takes a module per layer, whatever its weights are.
_LARGEST = {"num_hidden_layers": 10_000, "num_local_experts": 100_000, "num_experts": 100_000}
_BITSANDBYTES = logging.getLogger("bitsandbytes.autograd._functions")


class _Once(logging.Filter):
    """Lets every message through once; bitsandbytes repeats one at every layer of every pass."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


_ONCE = _Once()


def load_model(
    base: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    quantization: str | None = None,
    revision: str | None = None,
) -> nn.Module:
    """Load a causal language model for evaluation.

    Args:
        base: Local directory, hub id, or a GGUF file in either (`folder/name.gguf`, `owner/name/name.gguf`).
        dtype: `auto` (that of the checkpoint), `float32`, `bfloat16` or `float16`.
        device: Such as `cpu`, `cuda:1`, or `auto` to spread over all GPUs; a GPU if there is one by default.
        quantization: `4bit` or `8bit` (bitsandbytes), or None.
        revision: Hub revision.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: If an option is unknown, or the model cannot be loaded.
    """
    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype '{dtype}'; expected one of {sorted(DTYPES)}.")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise InputError(f"Unknown quantization '{quantization}'; expected one of {list(QUANTIZATIONS)}.")
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": DTYPES[dtype], "revision": revision, "device_map": device or default_device()}
    _config(base, revision)
    if quantization is not None:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{quantization}": True})
    source, file = _source(base)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, **file, **options, **_SAFE_WEIGHTS, output_loading_info=True
        )
    except _UNREADABLE as error:
        raise InputError(_why_not_loaded("base model", base, error)) from error
    absent = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if absent:
        raise InputError(
            f"The weights of the base model '{base}' lack {len(absent)} tensors that its config.json asks for, such as "
            f"'{absent[0]}': they would be random. Give the complete model."
        )
    never_repack(model)
    _BITSANDBYTES.addFilter(_ONCE)
    return model.eval()  # type: ignore[no-any-return]


def load_tokenizer(base: str, *, revision: str | None = None) -> Any:
    """Load the tokenizer of a model.

    Args:
        base: As in `load_model`.
        revision: Hub revision.

    Returns:
        The tokenizer.

    Raises:
        InputError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    source, file = _source(base)
    try:
        return AutoTokenizer.from_pretrained(source, **file, revision=revision, **_NO_CODE)
    except _UNREADABLE as error:
        raise InputError(_why_not_loaded("tokenizer of", base, error)) from error


def parameter_count(base: str, *, revision: str | None = None) -> int:
    """Return the number of parameters of a model without loading its weights.

    Args:
        base: As in `load_model`.
        revision: Hub revision.

    Returns:
        The number.

    Raises:
        InputError: If its configuration cannot be read.
    """
    from transformers import AutoModelForCausalLM

    config = _config(base, revision)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **_NO_CODE)
    except _UNREADABLE as error:
        raise InputError(f"The configuration of '{base}' makes no causal language model: {error}") from error
    return sum(parameter.numel() for parameter in model.parameters())


def _why_not_loaded(what: str, base: str, error: Exception) -> str:
    """Say why transformers did not load something, in words that fit what sstmerge does."""
    if "trust_remote_code" in str(error):
        return (
            f"The {what} '{base}' needs Python code from its repository, which sstmerge never runs. Give a model whose "
            "architecture transformers knows; a newer transformers may know this one."
        )
    words = f"The {what} '{base}' cannot be loaded: {error}"
    pickled = sorted(path.name for path in Path(base).glob("*.bin")) if Path(base).is_dir() else []
    if pickled and not any(Path(base).glob("*.safetensors")):
        words += (
            f" It has pickled weights ({pickled[0]}), which sstmerge does not load because pickles can run code: load them "
            "in transformers and call save_pretrained()."
        )
    return words


def _source(base: str) -> tuple[str, dict[str, str]]:
    """Return the folder or hub id of a model, and which file of it, if it is a GGUF file."""
    if not base.endswith(".gguf"):
        return base, {}
    folder, _, file = base.rpartition("/")
    return folder or ".", {"gguf_file": file}


def _config(base: str, revision: str | None) -> Any:
    """Return the configuration of a model, which must be that of a model somebody can have trained."""
    from transformers import AutoConfig

    source, file = _source(base)
    try:
        config = AutoConfig.from_pretrained(source, **file, revision=revision, **_NO_CODE)
    except _UNREADABLE as error:
        raise InputError(_why_not_loaded("base model", base, error)) from error
    text = getattr(config, "text_config", None) or config
    for name, largest in _LARGEST.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and value > largest:
            raise InputError(f"The configuration of '{base}' says {name} = {value:,}; at most {largest:,} is believed.")
    return config
