"""Hostile files, one by one: what is refused, in which words, and that nothing is executed or allocated for it."""

from __future__ import annotations

import ast
import json
import struct
import time
from pathlib import Path

import pytest
import torch
from cli_runs import run_command
from safetensors.torch import load_file, save_file

import sstmerge
from sstmerge.adapters import load_adapter
from sstmerge.adapters.configuration import rank_and_scaling, read_config
from sstmerge.cli.configuration import read_yaml
from sstmerge.errors import AdapterError, InputError
from sstmerge.merging.methods.aligned_pair import Checkpoint
from sstmerge.pipeline.models import load_model
from sstmerge.untrusted import LONGEST_HEADER, parse_json, read_tensor_headers

PACKAGE = Path(sstmerge.__file__).parent
LOADERS = {"from_pretrained", "from_config"}


@pytest.fixture
def folder(valid, tmp_path):
    """Return a copy of an adapter directory that may be spoiled."""
    for file in valid.adapters["safety"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def safetensors_file(path, header, data=b"", length=None):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape, size, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        ({}, 2**63, "is cut short"),
        ({"a": entry([2**40, 2**20], 4)}, None, "declares tensors of"),
        ({"a": entry([0, 3], 0)}, None, r"has shape \(0, 3\): it is empty"),
        ({"a": entry([1], 4, "F128")}, None, "has dtype F128"),
        ({"a": entry([-1], 4)}, None, "no dtype and shape"),
        ({"a" * 5000: entry([1], 4)}, None, "characters long"),
        ({"__metadata__": {"a": 3}}, None, "must be texts"),
        ([1], None, "must be a JSON object"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(tmp_path, header, length, words):
    file = safetensors_file(tmp_path / "f", header, bytes(4), length)
    with pytest.raises(InputError, match=words):
        read_tensor_headers(file, "f")


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    file = tmp_path / "f"
    with file.open("wb") as content:
        content.write(struct.pack("<Q", LONGEST_HEADER + 1))
        content.truncate(LONGEST_HEADER + 100)  # a sparse file
    with pytest.raises(InputError, match="at most"):
        read_tensor_headers(file, "f")


@pytest.mark.parametrize("text", ["[" * 10**5, "9" * 5000, '"\\ud800"', "{", "\x00"])
def test_json_that_breaks_a_parser_is_a_sentence(text):
    with pytest.raises(InputError, match=r"^it "):
        parse_json(text, "it")


def test_pickled_weights_are_refused_with_words(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickles can run code"):
        load_adapter(folder)


def test_pickled_models_are_not_loaded(job, tmp_path):
    for file in Path(job["base"]).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(Path(job["base"]) / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_model(str(tmp_path), device="cpu")


def test_a_model_without_all_its_weights_is_refused(job, tmp_path):
    for file in Path(job["base"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors .*up_proj.* would be random"):
        load_model(str(tmp_path), device="cpu")


def test_a_model_that_brings_code_is_refused_and_its_code_not_run(job, tmp_path):
    for file in Path(job["base"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(InputError, match="needs Python code from its repository, which sstmerge never runs"):
        load_model(str(tmp_path), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_a_model_are_refused_by_name(job, tmp_path):
    for file in Path(job["base"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        load_model(str(tmp_path), device="cpu")


def test_every_loader_of_transformers_forbids_code():
    found = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS):
                continue
            found += 1
            source = ast.unparse(node)
            words = ("trust_remote_code=False", "_NO_CODE", "_SAFE_WEIGHTS", "**options")
            assert any(word in source for word in words), f"{path.name}:{node.lineno}: {source}"
    assert found >= 4
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "torch.load(" not in text, path


def test_shards_lie_beside_their_index(tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "outside.safetensors")
    for shard in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", ""):
        (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x.weight": shard}}))
        with pytest.raises(InputError, match="no file beside it"):
            Checkpoint(inside, "base")


@pytest.mark.parametrize("pattern", ["(a+)+", "(.*)*", "(a|a)*b", ".*.*.*.*.*x", "a{9}" * 9, "x" * 600, "["])
def test_patterns_that_match_forever_are_refused(folder, pattern):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {pattern: 2}}))
    began = time.monotonic()
    with pytest.raises(AdapterError, match=r"rank_pattern"):
        load_adapter(folder)
    assert time.monotonic() - began < 20


def test_patterns_that_peft_writes_still_work(folder):
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {r"layers\.\d+\.q_proj": 2, "up_proj": 3, ".*v_proj": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    read = read_config(folder / "adapter_config.json", "a")
    ranks = {
        n: rank_and_scaling(f"model.layers.1.{n}", read, "a")[0] for n in ("q_proj", "up_proj", "v_proj", "k_proj")
    }
    assert ranks == {"q_proj": 2, "up_proj": 3, "v_proj": 1, "k_proj": 4}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("r", True, "must give r >= 1"),
        ("lora_alpha", 10**400, "finite lora_alpha"),
        ("lora_alpha", "16", "finite lora_alpha"),
        ("base_model_name_or_path", ["x"], "must be text"),
        ("target_modules", [["q_proj"]], "list of texts"),
        ("alpha_pattern", "q_proj", "by module name"),
    ],
)
def test_fields_of_another_type_are_named(folder, key, value, words):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(AdapterError, match=words):
        load_adapter(folder)


def test_yaml_is_text_and_nothing_else(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "top: 08\nscale: 1e-3\nout: 2024-13-45\nflag: yes\nnone: ~\nempty:\ntag: !!python/object/apply:os.system x\n"
    )
    assert read_yaml(file) == {
        "top": "08",
        "scale": "1e-3",
        "out": "2024-13-45",
        "flag": "yes",
        "none": None,
        "empty": None,
        "tag": "x",
    }
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    file.write_text(bomb)
    with pytest.raises(InputError, match="alias"):
        read_yaml(file)


@pytest.mark.parametrize("source", ["~nobody/x", "a" * 5000, "../x", "/dev/null", "x/y/z"])
def test_names_that_are_no_files_are_sentences(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"neither a directory nor a hub id|not a local directory"):
        load_adapter(source)
    assert run_command("inspect", source)[0] == 2


def test_a_device_file_is_no_prompt_file(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("/dev/zero")
    arguments = ["check", "--base", "x", "--safety", "y", "--benign", "z", "--harm", str(tmp_path / "rows.jsonl")]
    code, err = run_command(*arguments)
    assert code == 2
    assert "Error:" in err
