"""Strategies that spoil files and values, and the one law of the fuzz tests: success, or a sentence and exit code 2."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cli_runs import run_command
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sstmerge.errors import SSTMergeError

# A handful, the same in every run; SSTMERGE_FUZZ_EXAMPLES=1000 looks for what they miss, with other examples every time.
EXAMPLES = int(os.environ.get("SSTMERGE_FUZZ_EXAMPLES", "12"))
few = settings(
    max_examples=EXAMPLES,
    derandomize="SSTMERGE_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# ---- values --------------------------------------------------------------------------------------------------------

texts = st.text(max_size=8) | st.sampled_from(
    ["", "..", "../../outside", "/etc/passwd", "a" * 300, "\x00", "\ud800", "(a+)+$", "[", "nan", "\x1b[2J", "null"]
)
numbers = st.sampled_from(
    [0, -1, 1, 2, 3, True, 10**400, 2**63, 2**31, 1e308, 1e-308, -0.0, float("nan"), float("inf"), 1e30, 1e-30, 0.5]
)
json_values = st.recursive(
    st.none() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)


def spoiled(valid: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a valid JSON object with up to three entries changed, removed or added, at any depth."""

    @st.composite
    def draw_spoiled(draw: st.DrawFn) -> dict[str, Any]:
        value = json.loads(json.dumps(valid))
        for _ in range(draw(st.integers(0, 3))):
            _spoil(value, draw)
        return value

    return draw_spoiled()


def _spoil(value: Any, draw: st.DrawFn) -> None:
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and draw(st.booleans()):
            value = inner
            continue
        action = draw(st.sampled_from(["change", "remove", "add"]))
        if action == "change":
            value[key] = draw(json_values)
        elif action == "remove":
            del value[key]
        elif isinstance(value, dict):
            value[draw(texts)] = draw(json_values)
        else:
            value.append(draw(json_values))
        return


# ---- files ---------------------------------------------------------------------------------------------------------


def spoiled_bytes(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return a valid file with bytes changed, cut off or added."""

    @st.composite
    def draw_bytes(draw: st.DrawFn) -> bytes:
        content = bytearray(valid)
        for _ in range(draw(st.integers(0, 3))):
            place = draw(st.integers(0, max(0, len(content) - 1)))
            kind = draw(st.sampled_from(["byte", "cut", "insert", "length"]))
            if kind == "byte" and content:
                content[place] = draw(st.integers(0, 255))
            elif kind == "cut":
                del content[place:]
            elif kind == "insert":
                content[place:place] = draw(st.binary(max_size=9))
            else:
                content[:8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**40, 2**63, len(content)])))
        return bytes(content)

    return draw_bytes()


def spoiled_safetensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> st.SearchStrategy[bytes]:
    """Return a safetensors file that is spoiled in its header, its numbers, its metadata or its bytes."""
    valid = save(tensors, metadata=metadata)
    length = struct.unpack("<Q", valid[:8])[0]
    header, data = json.loads(valid[8 : 8 + length]), valid[8 + length :]

    def assemble(spoiled_header: dict[str, Any]) -> bytes:
        text = json.dumps(spoiled_header).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + data

    return (
        spoiled_bytes(valid)
        | spoiled(header).map(assemble)
        | spoiled_tensors(tensors).map(lambda changed: save(changed, metadata=metadata))
        | _spoiled_metadata(metadata).map(lambda changed: save(tensors, metadata=changed))
    )


def spoiled_tensors(tensors: dict[str, torch.Tensor]) -> st.SearchStrategy[dict[str, torch.Tensor]]:
    """Return tensors with some of them rescaled, retyped, reshaped, renamed, removed, or filled with odd numbers."""

    @st.composite
    def draw_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
        changed = dict(tensors)
        for _ in range(draw(st.integers(0, 3))):
            name = draw(st.sampled_from(sorted(changed)))
            tensor = changed.pop(name)
            action = draw(st.sampled_from(["scale", "fill", "type", "shape", "rename", "remove"]))
            if action == "scale":
                changed[name] = (tensor.double() * draw(st.sampled_from([0.0, -1.0, 1e30, 1e-30, 1e200]))).to(
                    tensor.dtype
                )
            elif action == "fill":
                changed[name] = torch.full_like(tensor, draw(st.sampled_from([0, 1, -1]) | st.just(100)))
            elif action == "type":
                types = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
                changed[name] = tensor.to(draw(st.sampled_from(types)))
            elif action == "shape":
                changed[name] = draw(st.sampled_from([tensor.flatten(), tensor[:1].clone(), tensor[None], tensor[:0]]))
            elif action == "rename":
                changed[draw(texts).encode("ascii", "replace").decode() or "x"] = tensor
            if not changed:
                break
        return changed

    return draw_tensors()


def _spoiled_metadata(metadata: dict[str, str]) -> st.SearchStrategy[dict[str, str]]:
    """Return the metadata with one text spoiled, as JSON where it is JSON."""
    names = sorted(name for name, text in metadata.items() if text.startswith("{"))
    if not names:
        return st.just(metadata)
    return st.one_of(
        [spoiled(json.loads(metadata[n])).map(lambda value, n=n: {**metadata, n: _ascii(value)}) for n in names]
        + [texts.map(lambda text, n=n: {**metadata, n: _ascii(text)}) for n in names]
    )


def _ascii(value: Any) -> str:
    return json.dumps(value)


# ---- the law -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_sentences() -> Iterator[None]:
    """Let success and the project's own errors pass; anything else is a finding."""
    words = "success"
    try:
        yield
    except SSTMergeError as error:
        words = str(error)
    assert words.strip()
    assert len(words) < 5000


def check_command(arguments: list[str], out: Path | None = None, *, codes: tuple[int, ...] = (0, 2)) -> int:
    """Run a command: success, or words on stderr, exit code 2, and nothing left behind."""
    code, err = run_command(*arguments)
    assert code in codes, (arguments, code, err)
    assert "Traceback" not in err, (arguments, err)
    if code == 2:
        assert err.strip(), arguments
        # One line of sstmerge's, or the usage message of the command-line library.
        ours = [line for line in err.splitlines() if line.startswith("Error:")]
        assert len(ours) == 1 or "Usage:" in err, (arguments, err)
        if out is not None:
            assert not out.exists(), arguments
            assert not list(out.parent.glob(f".{out.name}.*")), arguments
    return code
