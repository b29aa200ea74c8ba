"""Adapter directories, Fisher files and prompt files of any content: success, or a sentence."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hostile import (
    check_command,
    few,
    json_values,
    only_sentences,
    spoiled,
    spoiled_bytes,
    spoiled_safetensors,
    texts,
)
from hypothesis import given
from hypothesis import strategies as st
from valid_files import STRUCTURES, read_safetensors

from sstmerge.adapters import CoreSpace, load_adapter
from sstmerge.fisher import Fisher
from sstmerge.pipeline.merge import merge_from_fishers
from sstmerge.prompts import load_examples

ROWS = [
    {"prompt": "make a cake", "response": "Take flour.", "weight": 2.0, "split": "test"},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]},
]


def write_adapter(folder: Path, config: bytes, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def check_adapter(valid, config: bytes, weights: bytes) -> None:
    """Load a spoiled adapter, build its space with a sound one, and merge the two from the command line."""
    with tempfile.TemporaryDirectory() as place:
        folder = write_adapter(Path(place) / "spoiled", config, weights)
        with only_sentences():
            adapter = load_adapter(folder, name="spoiled")
            CoreSpace.of([adapter, load_adapter(valid.adapters["safety"], name="safety")])
        out = Path(place) / "merged"
        arguments = [
            "merge",
            "--method",
            "ties",
            "--adapter",
            f"a={folder}",
            "--adapter",
            f"b={valid.adapters['safety']}",
        ]
        check_command([*arguments, "--out", str(out)], out)
        check_command(["inspect", str(folder)])


@few
@given(data=st.data())
def test_adapter_configurations(valid, data):
    folder = valid.adapters["utility"]
    config = (folder / "adapter_config.json").read_bytes()
    known = {**json.loads(config), "rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*up_proj": 4}}
    drawn = data.draw(spoiled(known).map(lambda value: json.dumps(value).encode()) | spoiled_bytes(config))
    check_adapter(valid, drawn, (folder / "adapter_model.safetensors").read_bytes())


@few
@given(data=st.data())
def test_adapter_weights(valid, data):
    folder = valid.adapters["utility"]
    drawn = data.draw(spoiled_safetensors(*read_safetensors(folder / "adapter_model.safetensors")))
    check_adapter(valid, (folder / "adapter_config.json").read_bytes(), drawn)


@few
@given(structure=st.sampled_from(STRUCTURES), data=st.data())
def test_fisher_files(valid, structure, data):
    gain, cost = valid.fishers[structure]
    drawn = data.draw(spoiled_safetensors(*read_safetensors(gain)))
    spoiled_is_gain = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as place:
        file, out = Path(place) / "spoiled.safetensors", Path(place) / "merged"
        file.write_bytes(drawn)
        pair = (file, cost) if spoiled_is_gain else (gain, file)
        loaded = [load_adapter(path, name=role) for role, path in valid.adapters.items()]
        with only_sentences():
            Fisher.load(file, loaded)
        with only_sentences():
            merge_from_fishers(*pair, utility=str(valid.adapters["utility"]), safety=str(valid.adapters["safety"]))
        arguments = [
            "merge",
            "--gain",
            str(pair[0]),
            "--cost",
            str(pair[1]),
            "--utility",
            str(valid.adapters["utility"]),
        ]
        check_command([*arguments, "--safety", str(valid.adapters["safety"]), "--out", str(out)], out)
        check_command(["inspect", str(file)])
        check_command(["inspect", "--json", str(file)])


def as_lines(rows: list[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@few
@given(
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt"]),
    content=spoiled_bytes(as_lines(ROWS))
    | st.lists(spoiled(ROWS[0]) | spoiled(ROWS[1]) | json_values, max_size=3).map(as_lines)
    | spoiled_bytes(json.dumps(ROWS).encode())
    | spoiled_bytes(b"prompt,response,messages\nhello,there,\n")
    | texts.map(lambda text: text.encode("utf-8", "surrogatepass")),
    split=st.none() | st.sampled_from(["test", ""]),
    limit=st.sampled_from([None, 0, 1, 2**70]),
)
def test_prompt_files(suffix, content, split, limit):
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"rows{suffix}"
        file.write_bytes(content)
        with only_sentences():
            examples = load_examples(file, split=split, limit=limit)
            for example in examples:
                example.prompt.encode()
                (example.response or "").encode()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"prompt": ' + "9" * 5000 + "}",
        '{"prompt": "x", "weight": 1' + "0" * 400 + "}",
        '{"prompt": "\\ud800"}',
    ],
)
def test_json_that_breaks_parsers(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text + "\n")
    with only_sentences():
        load_examples(tmp_path / "rows.jsonl")
    code = check_command(
        ["check", "--base", "x", "--safety", "y", "--harm", str(tmp_path / "rows.jsonl"), "--benign", "z"]
    )
    assert code == 2
