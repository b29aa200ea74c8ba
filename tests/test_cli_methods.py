"""`sstmerge merge --method …` and `sstmerge methods` as a user starts them, and the page of methods."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from builders import collect_pair_files
from safetensors.torch import load_file

from sstmerge import merge_adapters
from sstmerge.adapters import load_adapter
from sstmerge.cli import main
from sstmerge.merging.methods import REGISTRY
from sstmerge.pipeline.method_pages import markdown_page

PAGE = Path(__file__).parent.parent / "docs" / "METHODS.md"


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["sstmerge", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code or 0


def words(text: str) -> str:
    return " ".join(text.split())


def adapters(job: dict[str, str]) -> list[str]:
    return ["--adapter", f"u={job['utility']}", "--adapter", job["safety"]]


def same(left: Path, right: Path) -> bool:
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


FLAGS = ("--weight", "1", "--weight", "0.5", "--option", "density=0.4", "--option", "trim-density=0.9", "--seed", "3")


def test_merge_by_a_method_equals_the_function(monkeypatch, job, tmp_path, capsys):
    out = tmp_path / "cli"
    command = ["merge", "--method", "core_dare_ties", *adapters(job), *FLAGS, "--rank", "4", "--out", str(out)]
    assert run(monkeypatch, *command) == 0
    assert "core_dare_ties" in capsys.readouterr().out
    merge_adapters(
        {"u": job["utility"], "safety": job["safety"]},
        [1.0, 0.5],
        "core_dare_ties",
        options={"density": 0.4, "trim_density": 0.9},
        seed=3,
        rank=4,
        out=tmp_path / "function",
    )
    assert same(out, tmp_path / "function")


def test_a_yaml_configuration_equals_the_flags(monkeypatch, job, tmp_path):
    config = tmp_path / "merge.yaml"
    config.write_text(
        f"method: dare_ties\nadapter: [u={job['utility']}, {job['safety']}]\nweight: [1, 0.5]\nseed: 3\n"
        f"option: [density=0.4, trim-density=0.9]\nout: {tmp_path / 'yaml'}\n"
    )
    assert run(monkeypatch, "merge", "--config", str(config)) == 0
    flags = ["merge", "--method", "dare_ties", *adapters(job), *FLAGS, "--out", str(tmp_path / "flags")]
    assert run(monkeypatch, *flags) == 0
    assert same(tmp_path / "yaml", tmp_path / "flags")


def test_a_dry_run_prints_the_plan_and_writes_nothing(monkeypatch, job, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    out = tmp_path / "merged"
    command = ["merge", "--method", "ties", *adapters(job), "--weight", "1", "--weight", "0.25", "--dry-run"]
    assert run(monkeypatch, *command, "--out", str(out)) == 0
    plan = words(capsys.readouterr().out)
    for piece in ("ties: TIES", "[sign τ_t = γ]", "weight 0.25", "option density", "0.2", "float32"):
        assert piece in plan
    assert not any(tmp_path.iterdir())


def test_methods_with_fishers_take_their_files(monkeypatch, job, tmp_path):
    files = collect_pair_files(job, tmp_path)
    command = ["merge", "--adapter", f"u={job['utility']}", "--adapter", f"s={job['safety']}"]
    masked = ["--method", "fisher_ratio_mask", "--safety", "s", "--gain", files["gain"], "--cost", files["cost"]]
    assert run(monkeypatch, *command, *masked, "--out", str(tmp_path / "masked")) == 0
    assert load_adapter(tmp_path / "masked").layers
    # The two stand in for Fishers of the adapters' own data.
    diagonal = ["--method", "fisher_diagonal", "--fisher", f"u={files['cost']}", "--fisher", f"s={files['gain']}"]
    assert run(monkeypatch, *command, *diagonal, "--out", str(tmp_path / "diagonal")) == 0
    assert load_adapter(tmp_path / "diagonal").layers


def test_sst_by_its_name_is_the_merge_without_a_name(monkeypatch, job, tmp_path):
    files = collect_pair_files(job, tmp_path)
    roles = ["--utility", job["utility"], "--safety", job["safety"], "--gain", files["gain"], "--cost", files["cost"]]
    assert run(monkeypatch, "merge", *roles, "--top", "3", "--out", str(tmp_path / "unnamed")) == 0
    assert run(monkeypatch, "merge", "--method", "sst", *roles, "--top", "3", "--out", str(tmp_path / "named")) == 0
    assert same(tmp_path / "unnamed", tmp_path / "named")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "tie"], "Unknown method 'tie'"),
        (["--method", "ties", "--top", "3"], "--top are no flags of the method 'ties'"),
        (["--method", "ties", "--utility", "x"], "--utility are no flags"),
        (["--method", "ties", "--option", "density=none"], "density must be of type float, but is 'none'"),
        (["--method", "ties", "--option", "density=2"], "density must lie in (0.0, 1.0]"),
        (["--method", "ties", "--option", "density"], "--option expects KEY=VALUE"),
        (["--method", "ties", "--option", "share=1"], "'ties' has no option 'share'"),
        (["--method", "ties", "--weight", "1"], "one weight per adapter (2), but got 1"),
        (["--method", "ties", "--gain", "x"], "makes no use of gain (--gain)"),
        (["--method", "fisher_full"], "needs fishers (--fisher NAME=FILE)"),
        (["--method", "rank_one"], "needs to know which adapter is the safety adapter (safety=, --safety)"),
        (["--method", "ties", "--adapter", "u=somewhere"], "Two adapters have the name 'u'"),
        ([], "--adapter belong to other methods than sst"),
    ],
)
def test_a_wrong_call_is_a_sentence(monkeypatch, job, tmp_path, capsys, flags, message):
    assert run(monkeypatch, "merge", *adapters(job), *flags, "--out", str(tmp_path / "merged")) == 2
    assert message in words(capsys.readouterr().err)
    assert not any(tmp_path.iterdir())


def test_adapters_and_a_role_are_missing(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "merge", "--method", "ties", "--out", str(tmp_path / "merged")) == 2
    assert "give at least one" in words(capsys.readouterr().err)
    assert run(monkeypatch, "merge", "--out", str(tmp_path / "merged")) == 2
    assert "Give the --safety adapter" in words(capsys.readouterr().err)


def test_methods_lists_all_and_shows_one(monkeypatch, capsys):
    console = importlib.import_module("sstmerge.cli.reporting").console
    monkeypatch.setattr(console, "width", 200)  # COLUMNS is read when the console is made
    assert run(monkeypatch, "methods") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in REGISTRY.methods)
    assert run(monkeypatch, "methods", "iso_cts") == 0
    shown = words(capsys.readouterr().out)
    for piece in ("https://arxiv.org/abs/2502.04959", "option common_share", "number in [0, 1]", "0.8 by default"):
        assert piece in shown
    assert run(monkeypatch, "methods", "isocts") == 2
    assert "Unknown method 'isocts'" in words(capsys.readouterr().err)


def test_the_page_of_methods_is_up_to_date(monkeypatch, capsys):
    assert run(monkeypatch, "methods", "--markdown") == 0
    printed = capsys.readouterr().out
    assert printed == markdown_page(REGISTRY.methods.values())
    assert PAGE.read_text() == printed, "run: sstmerge methods --markdown > docs/METHODS.md"
    for name in REGISTRY.methods:
        assert f"\n## {name}\n" in printed
