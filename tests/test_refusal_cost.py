"""Refusals of benign prompts as a part of F_cost."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from builders import GPT2_TARGETS, dense_fisher, random_adapter, random_batch

from sstmerge.adapters import CoreSpace, load_adapter
from sstmerge.cli import main
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher import Fisher, collect_fisher
from sstmerge.gevp import solve
from sstmerge.pipeline.calibration import CollectionOptions, batches_of, collect_pair, refused
from sstmerge.prompts import Example

HARM, BENIGN, REFUSALS = (random_batch([7] * rows, seed=seed) for seed, rows in ((1, 10), (2, 12), (3, 6)))


@pytest.fixture(scope="module")
def model(pico_gpt2):
    return pico_gpt2().double()


@pytest.fixture(scope="module")
def space(model):
    a = random_adapter(model, "a", targets=GPT2_TARGETS, seed=1)
    return CoreSpace.of([a, random_adapter(model, "b", targets=("c_attn",), rank=1, seed=2)])


def examples(kind, count, weight=1.0):
    prompts = [({"role": "user", "content": f"{kind} {i}"},) for i in range(count)]
    return [Example(prompt, f"answer to {kind} {i}", weight, kind) for i, prompt in enumerate(prompts)]


def test_every_benign_prompt_gets_a_refusal_of_the_harm_file():
    harm, benign = examples("harm", 3), examples("benign", 20, weight=0.5)
    pairs = refused(benign, harm, CollectionOptions(refusal_weight=4.0, seed=1))
    assert [pair.messages for pair in pairs] == [example.messages for example in benign]
    assert {pair.response for pair in pairs} == {example.response for example in harm}
    assert {pair.weight for pair in pairs} == {2.0}
    assert pairs == refused(benign, harm, CollectionOptions(refusal_weight=4.0, seed=1))
    assert pairs != refused(benign, harm, CollectionOptions(refusal_weight=4.0, seed=2))
    assert refused(benign, harm, CollectionOptions()) == []


@pytest.mark.parametrize("structure", ["diagonal", "block", "global"])
def test_the_penalty_is_added_per_token(model, space, structure):
    def collect(batch, labels):
        return collect_fisher(model, [batch], space, structure=structure, labels=labels, reference="a")

    cost, penalty = collect(BENIGN, "sampled"), collect(REFUSALS, "data")
    total = cost.with_penalty(penalty)
    expected = (dense_fisher(cost) * cost.tokens + dense_fisher(penalty) * penalty.tokens) / (
        cost.tokens + penalty.tokens
    )
    torch.testing.assert_close(dense_fisher(total), expected)
    assert total.metadata == {**cost.metadata, "penalty": penalty.metadata["data"]}
    with pytest.raises(FisherError, match="reference"):
        cost.with_penalty(replace(penalty, metadata={**penalty.metadata, "reference": "b"}))


def test_sums_keep_the_penalty_and_no_looks(model, space):
    def collect(batch, labels, **options):
        found = collect_fisher(model, [batch], space, structure="diagonal", labels=labels, reference="a", **options)
        return replace(found, metadata={**found.metadata, "convergence": {"converged": True}})

    plain, more = collect(BENIGN, "sampled", draws=4), collect(HARM, "sampled", draws=4)
    penalised = plain.with_penalty(collect(REFUSALS, "data"))
    assert penalised.effective_sequences == plain.effective_sequences == 12  # the same prompts again
    assert "penalty" not in (plain + more).metadata
    for total in (penalised + more, more + penalised):
        assert total.metadata["penalty"] == [penalised.metadata["penalty"]]
        assert total.effective_sequences == pytest.approx(22)
    assert not any("convergence" in total.metadata for total in (penalised, plain + more, more + penalised))


def test_more_draws_leave_the_weight_of_refusals_as_it_is(model, space, pico_tokenizer):
    harm, benign, tokenizer = examples("harm", 2), examples("benign", 3), pico_tokenizer()

    def share(draws):
        options = CollectionOptions(structure="diagonal", reference="a", refusal_weight=2.0, draws=draws)
        harmful, answered, refusing = (
            batches_of(model, tokenizer, rows, options) for rows in (harm, benign, refused(benign, harm, options))
        )
        plain = collect_pair(model, space, harmful, answered, options)[1]
        penalised = collect_pair(model, space, harmful, answered, options, refusals=refusing)[1]
        return 1 - plain.tokens / penalised.tokens

    assert 0 < share(1) < 1
    assert share(4) == pytest.approx(share(1))


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_pair_is_collected_with_it(model, space, structure, tmp_path):
    options = CollectionOptions(structure=structure, reference="a", refusal_weight=1.0)
    gain, cost = collect_pair(model, space, [HARM], [BENIGN], options, refusals=[REFUSALS])
    plain = replace(options, structure="kfac")
    first = [
        collect_fisher(model, [batch], space, structure="kfac", labels=labels, reference="a")
        for batch, labels in ((HARM, "data"), (BENIGN, "sampled"), (REFUSALS, "data"))
    ]
    if structure == "ekfac":
        basis = solve(first[0], first[1].with_penalty(first[2])).basis
        assert all(map(torch.equal, cost.kronecker_basis().P, basis.P))
    else:
        without = collect_pair(model, space, [HARM], [BENIGN], plain)[1]
        assert "penalty" not in without.metadata
        added = without.statistics["output_covariance.0"] + first[2].statistics["output_covariance.0"]
        torch.testing.assert_close(cost.statistics["output_covariance.0"], added)
    assert "penalty" not in gain.metadata
    cost.save(tmp_path / "cost.safetensors")
    assert Fisher.load(tmp_path / "cost.safetensors", space.adapters).metadata["penalty"] == cost.metadata["penalty"]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_make_no_sense(weight):
    with pytest.raises(InputError, match="refusal_weight must be a finite number >= 0"):
        CollectionOptions(refusal_weight=weight)


def test_it_needs_all_data():
    with pytest.raises(InputError, match="refusal_weight takes all data"):
        CollectionOptions(refusal_weight=1.0, max_samples=4)


def run(monkeypatch, capsys, job, out, *more):
    arguments = ["--base", job["base"], "--utility", job["utility"], "--safety", job["safety"], "--device", "cpu"]
    arguments += [
        "--harm",
        job["harm.jsonl"],
        "--benign",
        job["benign.jsonl"],
        "--structure",
        "kfac",
        "--out",
        str(out),
    ]
    monkeypatch.setattr("sys.argv", ["sstmerge", "merge", *arguments, *more])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).split())


def test_command(monkeypatch, capsys, job, tmp_path):
    rule = ("--rule", "wiener", "--mu", "1")
    said = [run(monkeypatch, capsys, job, tmp_path / "plain", *rule)]
    said.append(run(monkeypatch, capsys, job, tmp_path / "penalised", *rule, "--refusal-weight", "4"))
    assert ["Refusals of benign prompts count as cost" in words for words in said] == [False, True]
    plain, penalised = (load_adapter(tmp_path / name) for name in ("plain", "penalised"))
    assert any(
        not torch.allclose(plain.layers[n].delta(), penalised.layers[n].delta(), rtol=1e-3) for n in plain.layers
    )


def test_dry_run_counts_the_pass(monkeypatch, capsys, job, tmp_path):
    def flop(*more):
        words = run(monkeypatch, capsys, job, tmp_path / "out", "--dry-run", *more)
        return re.search(r"about ([0-9.,]+) TFLOP", words).group(1)

    monkeypatch.setattr("sstmerge.pipeline.plan.parameter_count", lambda base: 10**12)
    assert float(flop("--refusal-weight", "1").replace(",", "")) > float(flop().replace(",", ""))
