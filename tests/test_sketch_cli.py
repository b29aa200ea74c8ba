"""`sketch` on the command line, and merges and curves from its files."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from builders import write_peft_adapter, write_rows
from collection_cases import command_line
from processes import start, together, wait_until

from sstmerge import load_sketch
from sstmerge.adapters import load_adapter
from sstmerge.cli import main
from sstmerge.pipeline.merge import merge_from_fishers

FULL_RANK = "64"  # no layer of the model is wider than 48


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["sstmerge", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code or 0


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def files(job, tmp_path_factory):
    """Sketches of full rank and kfac Fishers at the base model, of gain and cost, as files."""
    folder = tmp_path_factory.mktemp("sketches")
    paths = {name: str(folder / f"{name}.safetensors") for name in ("gain", "cost", "gain_fisher", "cost_fisher")}
    adapters = ("--adapter", f"u={job['utility']}", "--adapter", f"s={job['safety']}", "--structure", "kfac")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for role, data, labels in (("gain", "harm.jsonl", "data"), ("cost", "benign.jsonl", "sampled")):
            shared = ("--base", job["base"], "--data", job[data], "--labels", labels, "--completion-tokens", "4")
            assert run(monkeypatch, "sketch", *shared, "--rank", FULL_RANK, "--out", paths[role]) == 0
            assert run(monkeypatch, "fisher", *shared, *adapters, "--out", paths[f"{role}_fisher"]) == 0
    return paths


def merge_arguments(job, gain: str, cost: str, out) -> tuple[str, ...]:
    return (
        *("merge", "--gain", gain, "--cost", cost, "--utility", job["utility"], "--safety", job["safety"]),
        *("--top", "5", "--out", str(out)),
    )


def test_a_merge_from_sketches_of_full_rank_is_the_merge_from_fishers(monkeypatch, job, files, tmp_path):
    pairs = {"sketches": ("gain", "cost"), "fishers": ("gain_fisher", "cost_fisher"), "mixed": ("gain", "cost_fisher")}
    for name, (gain, cost) in pairs.items():
        assert run(monkeypatch, *merge_arguments(job, files[gain], files[cost], tmp_path / name)) == 0
    merged = {name: load_adapter(tmp_path / name) for name in pairs}
    reports = {name: json.loads((tmp_path / name / "sstmerge_report.json").read_text()) for name in pairs}
    for name in ("sketches", "mixed"):
        for path, factors in merged["fishers"].layers.items():
            torch.testing.assert_close(merged[name].layers[path].delta(), factors.delta(), atol=1e-5, rtol=1e-4)
        for key in ("predicted_kl", "predicted_gain", "gain_kept"):
            assert reports[name]["merge"][key] == pytest.approx(reports["fishers"]["merge"][key], rel=1e-4)
        assert reports[name]["stability"]["subspace_overlap"] == pytest.approx(
            reports["fishers"]["stability"]["subspace_overlap"], rel=1e-3
        )


def test_adapters_that_did_not_exist_at_collection_are_merged(monkeypatch, job, files, pico_llama, tmp_path):
    write_peft_adapter(pico_llama(), tmp_path / "new", seed=9, rank=4, targets=["k_proj", "o_proj", "gate_proj"])
    result = merge_from_fishers(files["gain"], files["cost"], utility=job["utility"], safety=str(tmp_path / "new"))
    assert set(result.adapter.layers) == {*load_adapter(tmp_path / "new").layers, *load_adapter(job["utility"]).layers}
    assert result.merge.report.predicted_kl > 0
    arguments = ("--utility", job["utility"], "--safety", str(tmp_path / "new"), "--budgets", "0.001")
    code = run(
        monkeypatch,
        *("curve", "--gain", files["gain"], "--cost", files["cost"], *arguments, "--out", str(tmp_path / "curve")),
    )
    assert code == 0


def test_the_command_says_what_it_costs_and_inspect_what_it_holds(monkeypatch, job, files, tmp_path, capsys):
    shared = ("--base", job["base"], "--data", job["harm.jsonl"], "--labels", "data")
    out = str(tmp_path / "s.safetensors")
    assert run(monkeypatch, "sketch", *shared, "--rank", "8", "--target", "q_proj", "--seed", "3", "--out", out) == 0
    assert "Sketching 2 layers with rank 8" in " ".join(capsys.readouterr().out.split())
    sketch = load_sketch(out)
    assert (sketch.signs.rank, sketch.signs.seed, len(sketch.layers)) == (8, 3, 2)
    assert not (tmp_path / "s.safetensors.checkpoint").exists()
    assert run(monkeypatch, "inspect", files["gain"]) == 0
    printed = capsys.readouterr().out
    assert "Sketch" in printed
    assert "14" in printed
    assert run(monkeypatch, "inspect", files["gain"], "--json") == 0
    assert json.loads(capsys.readouterr().out)["rank"] == int(FULL_RANK)


@pytest.fixture
def long_job(job, tmp_path):
    """A sketch on the command line that takes a while; its prompts have no responses, so that it answers them first."""
    rows = [{"prompt": f"steal {i}"} for i in range(3)]
    rows += [{"prompt": f"steal {i}", "response": f"I won't steal {i}, nor {i + 1}."} for i in range(20)]
    return [
        *("sketch", "--base", job["base"], "--data", str(write_rows(tmp_path / "rows.jsonl", rows)), "--rank", "8"),
        *("--labels", "sampled", "--completion-tokens", "4", "--tokens-per-batch", "64", "--device", "cpu"),
        *("--checkpoint-batches", "1"),
    ]


def test_stopped_and_launched_commands_give_the_same_bits(long_job, tmp_path):
    out = {name: tmp_path / name for name in ("whole", "resumed", "launched")}
    assert start(tmp_path / "p0", command_line, *long_job, "--out", str(out["whole"])).join()["exit"] == 0
    process = start(tmp_path / "p1", command_line, *long_job, "--out", str(out["resumed"]))
    kept = tmp_path / "resumed.checkpoint" / "sketch"
    wait_until(lambda: any(kept.glob("start-*.safetensors")) or not process.process.is_alive())
    process.kill(signal.SIGINT)
    assert process.join()["exit"] == 130
    assert not out["resumed"].exists()
    words = " ".join((tmp_path / "p1" / "output.txt").read_text().split())
    assert f"What was collected is kept in '{out['resumed']}.checkpoint'; the same command goes on" in words
    assert start(tmp_path / "p2", command_line, *long_job, "--out", str(out["resumed"])).join()["exit"] == 0
    assert not kept.parent.exists()
    outcomes = together(tmp_path / "p3", 2, command_line, *long_job, "--out", str(out["launched"]))
    assert [outcome["exit"] for outcome in outcomes] == [0, 0]
    words = [" ".join((tmp_path / "p3" / f"process{rank}" / "output.txt").read_text().split()) for rank in range(2)]
    assert "sketch of rank 8 of 23 sequences" in words[0]
    assert words[1] == ""
    assert out["whole"].read_bytes() == out["resumed"].read_bytes() == out["launched"].read_bytes()


def test_sums_that_cannot_fit_are_refused(monkeypatch, job, tmp_path, capsys):
    sizes = iter([1e12, 100.0])  # the model fits, the sums do not
    monkeypatch.setattr("sstmerge.pipeline.process_memory._meminfo_available", lambda: next(sizes))
    shared = ("--base", job["base"], "--data", job["harm.jsonl"], "--labels", "data", "--out", str(tmp_path / "s"))
    assert run(monkeypatch, "sketch", *shared) == 2
    assert "partial sums of the sketch" in said(capsys)
    assert not (tmp_path / "s").exists()


def test_sketches_of_different_models_are_refused(
    monkeypatch, job, files, pico_llama, pico_tokenizer, tmp_path, capsys
):
    pico_llama(seed=1).save_pretrained(tmp_path / "other")
    pico_tokenizer().save_pretrained(tmp_path / "other")
    cost = str(tmp_path / "cost.safetensors")
    shared = ("--data", job["benign.jsonl"], "--labels", "sampled", "--completion-tokens", "4", "--rank", "8")
    assert run(monkeypatch, "sketch", "--base", str(tmp_path / "other"), *shared, "--out", cost) == 0
    capsys.readouterr()
    assert run(monkeypatch, *merge_arguments(job, files["gain"], cost, tmp_path / "merged")) == 2
    assert "collected on different base models" in said(capsys)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("--rank", "0"), "The rank of a sketch must be at least 1"),
        (("--labels", "some"), "Unknown labels 'some'"),
        (("--target", "lm_head"), "output head is never sketched"),
        (("--checkpoint-batches", "0"), "must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(monkeypatch, job, tmp_path, capsys, change, expected):
    out = tmp_path / "s.safetensors"
    arguments = ["--base", job["base"], "--data", job["harm.jsonl"], "--labels", "data", "--out", str(out), *change]
    assert run(monkeypatch, "sketch", *arguments) == 2
    assert expected in said(capsys)
    assert not out.exists()
