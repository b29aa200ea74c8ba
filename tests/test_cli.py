"""Every command as a user starts it, on a pico model with adapters that PEFT wrote."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from builders import write_peft_adapter
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sstmerge.adapters import load_adapter
from sstmerge.cli import app as cli_app
from sstmerge.cli import main
from sstmerge.pipeline.calibration import CollectionOptions
from sstmerge.pipeline.models import load_tokenizer
from sstmerge.pipeline.plan import plan_merge
from sstmerge.prompts import encode, load_examples, prompt_tokens


def run(monkeypatch, *arguments: str) -> int:
    """Run the command line and return its exit code."""
    monkeypatch.setattr("sys.argv", ["sstmerge", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code or 0


def merge_arguments(job: dict[str, str], out: Path, *more: str) -> list[str]:
    return [
        "merge",
        *("--base", job["base"], "--utility", job["utility"], "--safety", job["safety"]),
        *("--harm", job["harm.jsonl"], "--benign", job["benign.jsonl"], "--out", str(out)),
        *("--completion-tokens", "4", *more),
    ]


def fisher_files(monkeypatch, job: dict[str, str], folder: Path, structure: str = "kfac") -> tuple[str, str]:
    files = []
    for role, data, labels in (("gain", "harm.jsonl", "data"), ("cost", "benign.jsonl", "sampled")):
        files.append(str(folder / f"{role}.safetensors"))
        code = run(
            monkeypatch,
            *("fisher", "--base", job["base"], "--data", job[data], "--labels", labels, "--out", files[-1]),
            *("--adapter", f"u={job['utility']}", "--adapter", f"s={job['safety']}", "--reference", "u"),
            *("--structure", structure, "--completion-tokens", "4"),
        )
        assert code == 0
    return files[0], files[1]


@pytest.mark.parametrize(
    "options",
    [
        ("--structure", "global", "--top", "2"),
        ("--structure", "kfac", "--energy", "0.9", "--rank", "2"),
        ("--structure", "ekfac", "--budget", "0.001"),
        ("--structure", "block", "--rule", "wiener", "--mu", "1.0", "--scale", "0.5"),
        ("--structure", "block", "--rule", "wiener", "--mu", "1.0", "--exponent", "2", "--scale", "4"),
        ("--structure", "diagonal", "--rule", "joint", "--mu", "0.5"),
        ("--structure", "kfac", "--reference", "path:utility:utility+safety:2", "--draws", "2"),
        ("--structure", "kfac", "--module-share", "0.5", "--dimension-share", "0.7", "--pilot", "4"),
        ("--structure", "global", "--rule", "refit", "--top", "3", "--response-tokens", "3"),
    ],
)
def test_merge_writes_an_adapter_that_peft_loads(monkeypatch, job, tmp_path, options):
    out = tmp_path / "merged"
    assert run(monkeypatch, *merge_arguments(job, out, *options)) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job["base"]), out)
    ours = load_adapter(out)
    for path, factors in ours.layers.items():
        module = model.get_base_model().get_submodule(path)
        torch.testing.assert_close(module.get_delta_weight("default").double(), factors.delta(), atol=1e-6, rtol=1e-5)
    utility = load_adapter(job["utility"])
    moved = sum(float((ours.layers[p].delta() - utility.layers[p].delta()).norm()) for p in utility.layers)
    assert moved > 0
    report = json.loads((out / "sstmerge_report.json").read_text())
    assert report["merge"]["predicted_kl"] > 0
    if "--rank" in options:
        assert {factors.rank for factors in ours.layers.values()} == {2}


def test_merge_from_fishers_equals_merge_from_prompts(monkeypatch, job, tmp_path):
    gain, cost = fisher_files(monkeypatch, job, tmp_path)
    adapters = ("--utility", job["utility"], "--safety", job["safety"])
    code = run(
        monkeypatch,
        *("merge", "--gain", gain, "--cost", cost, *adapters, "--top", "5", "--out", str(tmp_path / "from_fishers")),
    )
    assert code == 0
    direct = merge_arguments(job, tmp_path / "direct", "--structure", "kfac", "--top", "5")
    assert run(monkeypatch, *direct) == 0
    one, other = load_adapter(tmp_path / "from_fishers"), load_adapter(tmp_path / "direct")
    for path in one.layers:
        torch.testing.assert_close(one.layers[path].delta(), other.layers[path].delta(), atol=1e-7, rtol=1e-5)


def test_split_halves_of_a_filter_cost_what_its_scale_makes_of_them(monkeypatch, job, tmp_path):
    gain, cost = fisher_files(monkeypatch, job, tmp_path)
    adapters = ("--utility", job["utility"], "--safety", job["safety"])
    kl = {}
    for scale in ("2", "4"):
        out = tmp_path / scale
        rule = ("--rule", "wiener", "--mu", "5", "--exponent", "2", "--scale", scale)
        assert run(monkeypatch, "merge", "--gain", gain, "--cost", cost, *adapters, *rule, "--out", str(out)) == 0
        report = json.loads((out / "sstmerge_report.json").read_text())
        kl[scale] = report["stability"]["held_out_kl"], report["merge"]["predicted_kl"]
    assert kl["4"] == pytest.approx([4 * value for value in kl["2"]], rel=1e-6)


def test_a_yaml_configuration_equals_the_flags(monkeypatch, job, tmp_path):
    config = tmp_path / "merge.yaml"
    config.write_text(
        f"base: {job['base']}\nutility: [{job['utility']}]\nsafety: {job['safety']}\nharm: [{job['harm.jsonl']}]\n"
        f"benign: [{job['benign.jsonl']}]\nstructure: kfac\ntop: 3\ncompletion-tokens: 4\nout: {tmp_path / 'yaml'}\n"
    )
    assert run(monkeypatch, "merge", "--config", str(config)) == 0
    assert run(monkeypatch, *merge_arguments(job, tmp_path / "flags", "--structure", "kfac", "--top", "3")) == 0
    from_yaml, from_flags = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("yaml", "flags"))
    assert all(torch.equal(from_yaml[key], from_flags[key]) for key in from_flags)


def test_an_unknown_key_of_a_configuration_is_refused(monkeypatch, tmp_path, capsys):
    (tmp_path / "merge.yaml").write_text("topp: 3\n")
    assert run(monkeypatch, "merge", "--config", str(tmp_path / "merge.yaml")) == 2
    assert "'topp', which is no flag" in capsys.readouterr().err.replace("\n", " ")


def test_a_dry_run_prints_the_plan_and_writes_nothing(monkeypatch, job, tmp_path, capsys):
    assert run(monkeypatch, *merge_arguments(job, tmp_path / "merged", "--dry-run")) == 0
    plan = capsys.readouterr().out
    assert "TFLOP" in plan
    assert "8 sequences" in plan
    assert not (tmp_path / "merged").exists()


def planned(job, options: CollectionOptions) -> list[str]:
    roles = {role: job[role] for role in ("utility", "safety")}
    table = plan_merge(job["base"], [job["harm.jsonl"]], [job["benign.jsonl"]], options, **roles)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return [str(value) for name, value in rows if str(name).endswith("prompts")]


def test_a_plan_counts_prompts_without_a_response(job):
    tokenizer = load_tokenizer(job["base"])
    examples = load_examples(job["benign.jsonl"])
    answered = encode([e for e in examples if e.response], tokenizer, max_length=10**9)
    (unanswered,) = [e for e in examples if not e.response]
    for options, answer in (
        (CollectionOptions(), 32),
        (CollectionOptions(completion_tokens=5), 5),
    ):
        tokens = sum(len(e.input_ids) for e in answered) + len(prompt_tokens(unanswered, tokenizer)) + answer
        assert planned(job, options)[1] == f"9 sequences, {tokens} tokens"


def test_a_plan_knows_the_largest_number_of_samples(job):
    everything, some = (planned(job, CollectionOptions(max_samples=n)) for n in (None, 2))
    harm, all_harm = (re.findall(r"\d+", rows[0]) for rows in (some, everything))
    assert harm[:2] == ["2", "8"]
    assert int(harm[2]) == pytest.approx(int(all_harm[1]) / 4, abs=1)


def test_curve_from_fishers(monkeypatch, job, tmp_path):
    gain, cost = fisher_files(monkeypatch, job, tmp_path)
    adapters = ("--utility", job["utility"], "--safety", job["safety"])
    out = tmp_path / "curve"
    code = run(
        monkeypatch,
        *("curve", "--gain", gain, "--cost", cost, *adapters, "--budgets", "0.0005,0.001", "--out", str(out)),
        "--write-adapters",
    )
    assert code == 0
    with (out / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["project", "project", "task arithmetic", "task arithmetic"]
    assert [float(row["predicted_kl"]) for row in rows] == pytest.approx([0.0005, 0.001] * 2, rel=1e-5)
    for picture in ("curve.png", "spectrum.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert load_adapter(out / "01-project").layers


def test_curve_prints_every_warning_once(monkeypatch, valid, tmp_path, capsys):
    gain, cost = map(str, valid.fishers["kfac"])
    adapters = [f for role in ("utility", "safety") for f in (f"--{role}", str(valid.adapters[role]))]
    arguments = ("--gain", gain, "--cost", cost, *adapters, "--scales", "1,2", "--out", str(tmp_path / "curve"))
    assert run(monkeypatch, "curve", *arguments) == 0
    said = capsys.readouterr().err
    points = json.loads((tmp_path / "curve" / "curve.json").read_text())
    warnings = {sentence for point in points for sentence in point["warnings"]}
    assert any("effective harm sequences" in sentence for sentence in warnings)
    assert all(said.count(f"Warning: {sentence}") == 1 for sentence in warnings)


def test_evaluate_check_inspect_doctor(monkeypatch, job, tmp_path, capsys):
    code = run(
        monkeypatch,
        *("evaluate", "--base", job["base"], "--adapter", f"safe={job['safety']}", "--reference", "base"),
        *("--harmful", job["harm.jsonl"], "--benign", job["benign.jsonl"], "--max-new-tokens", "4"),
        *("--out", str(tmp_path / "evaluation.json")),
    )
    assert code == 0
    base, safe = json.loads((tmp_path / "evaluation.json").read_text())
    assert base["kl_to_reference"] == 0.0
    assert safe["kl_to_reference"] > 0
    assert safe["refusal_harmful"]["total"] == 8
    code = run(
        monkeypatch,
        *("check", "--base", job["base"], "--safety", job["safety"], "--utility", job["utility"]),
        *("--harm", job["harm.jsonl"], "--benign", job["benign.jsonl"], "--max-new-tokens", "4"),
        *("--out", str(tmp_path / "check.json")),
    )
    assert code == 0
    assert json.loads((tmp_path / "check.json").read_text())
    gain, _ = fisher_files(monkeypatch, job, tmp_path)
    capsys.readouterr()
    assert run(monkeypatch, "inspect", gain) == 0
    assert "kfac" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", job["safety"]) == 0
    assert "up_proj" in capsys.readouterr().out
    assert run(monkeypatch, "doctor") == 0
    assert "generalized_eigh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--safety": "{utility}/nowhere"}, "neither a directory nor a hub id"),
        ({"--harm": "{base}/missing.jsonl"}, "missing.jsonl"),
        ({"--rank": "99"}, "rank limit"),
        ({"--structure": "cubic"}, "Unknown structure 'cubic'"),
        ({"--rule": "average"}, "Unknown rule 'average'"),
        ({"--top": "3", "--energy": "0.5"}, "Give one of top, fraction and energy"),
        ({"--rule": "project", "--mu": "1"}, "mu belongs to"),
        ({"--rule": "joint", "--mu": "1", "--exponent": "2"}, "exponent belongs to the rule 'wiener'"),
        ({"--reference": "somebody"}, "somebody"),
        ({"--max-length": "5"}, "tokens"),
        ({"--out": "{base}"}, "exists"),
        ({"--dtype": "int8"}, "Unknown dtype"),
        ({"--gain": "a.safetensors"}, "--cost"),
        ({"--rule": "wiener"}, "needs mu"),
        ({"--rule": "refit", "--mu": "1"}, "'refit' takes top, fraction, energy or budget"),
        ({"--rule": "refit", "--module-share": "0.5"}, "leave out the module filter"),
        ({"--scale": "2", "--top": "3", "--budget": "0.1"}, "give either scale or budget"),
        ({"--scale": "nan"}, "scale must be a finite number"),
        ({"--damping": "-1"}, "damping must be"),
        ({"--top": "5000"}, "the space of these adapters has"),
        ({"--module-share": "2"}, "module_share must lie in (0, 1]"),
        ({"--dimension-share": "0.2"}, "dimension_share belong to the module filter; give module_share"),
        ({"--pilot": "2"}, "pilot belong to the module filter; give module_share"),
        ({"--draws": "0"}, "draws must be at least 1"),
        ({"--response-tokens": "0"}, "response_tokens must be at least 1"),
        ({"--harm": "{base}/../benign.jsonl"}, "Every harmful prompt needs a response"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(monkeypatch, job, tmp_path, capsys, change, expected):
    out = tmp_path / "merged"
    arguments = merge_arguments(job, out)
    for flag, value in change.items():
        value = value.format(**job)
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
        else:
            arguments += [flag, value]
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr().err
    assert expected in " ".join(printed.split())
    assert "Traceback" not in printed
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    "flags",
    [
        ("--rank", "99"),
        ("--rule", "average"),
        ("--rule", "wiener"),
        ("--rule", "refit", "--exponent", "2"),
        ("--rule", "refit", "--module-share", "0.5"),
        ("--scale", "2", "--top", "3", "--budget", "0.1"),
        ("--scale", "nan"),
        ("--damping", "-1"),
        ("--top", "5000"),
        ("--module-share", "2"),
        ("--pilot", "2"),
        ("--draws", "0"),
        ("--structure", "cubic"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_model_is_loaded(monkeypatch, job, tmp_path, flags, more):
    monkeypatch.setattr("sstmerge.pipeline.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert run(monkeypatch, *merge_arguments(job, tmp_path / "merged", *flags, *more)) == 2


@pytest.mark.parametrize("command", ["fisher", "sketch"])
@pytest.mark.parametrize(
    ("labels", "more", "expected"),
    [
        ("data", ("--draws", "4"), "--draws 4 draws sampled labels"),
        ("sampled", ("--draws", "0"), "draws must be at least 1"),
        ("sampled", ("--out", "{base}", "--overwrite"), "is a directory, but the result is a file"),
    ],
)
def test_collections_that_cannot_work_are_refused_before_the_model_is_loaded(
    monkeypatch, job, tmp_path, capsys, command, labels, more, expected
):
    monkeypatch.setattr("sstmerge.pipeline.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    adapters = ("--adapter", f"u={job['utility']}") if command == "fisher" else ()
    arguments = ("--base", job["base"], "--data", job["harm.jsonl"], "--out", str(tmp_path / "f"), *adapters)
    code = run(monkeypatch, command, *arguments, "--labels", labels, *(word.format(**job) for word in more))
    assert code == 2
    assert expected in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "flags",
    [
        ("--structure", "global"),
        ("--reference", "base"),
        ("--draws", "4"),
        ("--response-tokens", "6"),
        ("--max-length", "99"),
        ("--tokens-per-batch", "99"),
        ("--weight-sharing", "reduce"),
        ("--tolerance", "0.1"),
        ("--max-samples", "3"),
        ("--check-every", "8"),
        ("--refusal-weight", "4"),
        ("--completion-tokens", "4"),
        ("--module-share", "0.2"),
        ("--module-share", "0.2", "--dimension-share", "0.2", "--pilot", "4"),
        ("--split", "train"),
        ("--limit", "3"),
        ("--dtype", "float32"),
        ("--device", "cpu"),
        ("--quantization", "4bit"),
        ("--seed", "3"),
        ("--dry-run",),
    ],
)
def test_options_of_a_collection_have_no_place_beside_fishers(monkeypatch, valid, tmp_path, capsys, flags):
    gain, cost = map(str, valid.fishers["kfac"])
    adapters = [f for role in ("utility", "safety") for f in (f"--{role}", str(valid.adapters[role]))]
    out = tmp_path / "merged"
    assert run(monkeypatch, "merge", "--gain", gain, "--cost", cost, *adapters, "--out", str(out), *flags) == 2
    sentence = " ".join(capsys.readouterr().err.split())
    assert all(flag in sentence for flag in flags if flag.startswith("--"))
    assert "--gain and --cost are collected" in sentence
    assert not out.exists()


def test_a_fisher_of_other_adapters_is_refused(monkeypatch, job, tmp_path, capsys, pico_llama):
    gain, cost = fisher_files(monkeypatch, job, tmp_path)
    write_peft_adapter(pico_llama(), tmp_path / "other", seed=9, rank=3, targets=["q_proj", "up_proj", "down_proj"])
    code = run(
        monkeypatch,
        *("merge", "--gain", gain, "--cost", cost, "--utility", job["utility"], "--safety", str(tmp_path / "other")),
        *("--out", str(tmp_path / "merged")),
    )
    assert code == 2
    assert "missing or different" in " ".join(capsys.readouterr().err.split())


def test_the_application_lists_every_command():
    from sstmerge.cli import data_commands, demo_command, fisher_command, merge_commands, method_commands  # noqa: F401

    names = {command.name or command.callback.__name__ for command in cli_app.registered_commands}
    assert names == {
        "merge",
        "methods",
        "fisher",
        "curve",
        "inspect",
        "evaluate",
        "check",
        "verify",
        "doctor",
        "demo",
        "sketch",
    }
