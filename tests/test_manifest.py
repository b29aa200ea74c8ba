"""The manifest beside every output, and what `verify` finds."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from cli_runs import run_command

from sstmerge.errors import InputError
from sstmerge.pipeline.manifest import describe, manifest_path, read_manifest, verify


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def merged(valid, tmp_path):
    gain, cost = valid.fishers["kfac"]
    out = tmp_path / "merged"
    arguments = ["merge", "--gain", gain, "--cost", cost, "--top", "3", "--out", out]
    arguments += ["--utility", valid.adapters["utility"], "--safety", valid.adapters["safety"]]
    code, err = run_command(*map(str, arguments))
    assert code == 0, err
    return out


def test_a_manifest_says_what_made_the_output(valid, merged):
    manifest = json.loads((merged / "sstmerge_manifest.json").read_text())
    assert manifest["command"][:2] == ["sstmerge", "merge"]
    assert manifest["parameters"]["top"] == 3
    assert manifest["seed"] == 0
    assert {"sstmerge", "python", "torch", "safetensors", "transformers", "peft"} <= set(manifest["versions"])
    for output in ("adapter_config.json", "adapter_model.safetensors", "sstmerge_report.json"):
        assert manifest["outputs"][output]["sha256"] == sha256(merged / output)
    gain = valid.fishers["kfac"][0]
    assert manifest["inputs"][str(gain)] == {gain.name: {"bytes": gain.stat().st_size, "sha256": sha256(gain)}}
    weights = manifest["inputs"][str(valid.adapters["safety"])]["adapter_model.safetensors"]
    assert weights["sha256"] == sha256(valid.adapters["safety"] / "adapter_model.safetensors")
    assert run_command("verify", str(merged)) == (0, "")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("adapter_model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\1"), "SHA-256 differs"),
        ("adapter_config.json", lambda p: p.write_text("{}"), "has 2 bytes"),
        ("sstmerge_report.json", lambda p: p.unlink(), "is gone"),
        ("adapter_model.bin", lambda p: p.write_text("x"), "is not in the manifest"),
    ],
)
def test_verify_names_the_file_that_differs(merged, name, change, words):
    change(merged / name)
    (difference,) = verify(merged)
    assert difference.file == name
    assert words in difference.words
    assert run_command("verify", str(merged))[0] == 1


def test_inputs_are_compared_where_that_is_asked_for(valid, tmp_path):
    copy = tmp_path / "gain.safetensors"
    copy.write_bytes(valid.fishers["diagonal"][0].read_bytes())
    out = tmp_path / "curve"
    arguments = ["curve", "--gain", copy, "--cost", valid.fishers["diagonal"][1], "--scales", "1,2", "--out", out]
    arguments += ["--utility", valid.adapters["utility"], "--safety", valid.adapters["safety"]]
    assert run_command(*map(str, arguments))[0] == 0
    assert run_command("verify", "--inputs", str(out))[0] == 0
    copy.unlink()
    assert run_command("verify", str(out))[0] == 0
    assert run_command("verify", "--inputs", str(out))[0] == 1
    (difference,) = verify(out, inputs=True)
    assert "gain.safetensors" in difference.file


@pytest.mark.parametrize("named", ["", "expert="])
def test_a_sign_of_equality_in_a_path_hides_no_input(valid, tmp_path, named):
    folder = tmp_path / "lr=1e-4"
    copies = {role: shutil.copytree(path, folder / role) for role, path in valid.adapters.items()}
    out = tmp_path / "merged"
    if named:
        adapters = [
            "--method",
            "task_arithmetic",
            "--adapter",
            f"{named}{copies['utility']}",
            "--adapter",
            copies["safety"],
        ]
    else:
        gain, cost = valid.fishers["kfac"]
        adapters = ["--gain", gain, "--cost", cost, "--utility", copies["utility"], "--safety", copies["safety"]]
    code, err = run_command("merge", *map(str, adapters), "--out", str(out))
    assert code == 0, err
    inputs = json.loads((out / "sstmerge_manifest.json").read_text())["inputs"]
    for copy in copies.values():
        weights = copy / "adapter_model.safetensors"
        assert inputs[str(copy)][weights.name]["sha256"] == sha256(weights)
    assert run_command("verify", "--inputs", str(out))[0] == 0
    (copies["utility"] / "adapter_config.json").write_text("{}")
    assert run_command("verify", "--inputs", str(out))[0] == 1


def test_a_file_has_its_manifest_beside_it(valid, tmp_path):
    file = tmp_path / "f.safetensors"
    file.write_bytes(b"x")
    assert manifest_path(file) == tmp_path / "f.safetensors.manifest.json"
    with pytest.raises(InputError, match="has no manifest"):
        verify(file)
    assert run_command("verify", str(file))[0] == 2
    assert run_command("verify", str(tmp_path / "nothing"))[0] == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "outputs": 3, "inputs": {}}',
        '{"format": 1, "outputs": {"a": 1}}',
    ],
)
def test_a_damaged_manifest_is_unusable_input(merged, text):
    (merged / "sstmerge_manifest.json").write_text(text)
    with pytest.raises(InputError, match="manifest"):
        read_manifest(merged)
    assert run_command("verify", str(merged))[0] == 2


def test_names_in_a_manifest_are_compared_and_never_opened(merged, tmp_path):
    manifest = json.loads((merged / "sstmerge_manifest.json").read_text())
    (tmp_path / "outside").write_text("secret")
    manifest["outputs"]["../outside"] = {"bytes": 6, "sha256": sha256(tmp_path / "outside")}
    (merged / "sstmerge_manifest.json").write_text(json.dumps(manifest))
    (difference,) = verify(merged)
    assert (difference.file, difference.words) == ("../outside", "is gone")


def test_large_inputs_are_recorded_by_size(tmp_path):
    (tmp_path / "large").write_bytes(bytes(100))
    assert describe(tmp_path, largest=99) == {"large": {"bytes": 100, "sha256": None}}
