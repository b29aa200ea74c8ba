"""The page over all benchmarks, from made-up results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

# By its file: the experiments have a module of the same name.
specification = importlib.util.spec_from_file_location(
    "benchmark_report", Path(__file__).parents[1] / "benchmarks" / "report.py"
)
report = importlib.util.module_from_spec(specification)
sys.modules["benchmark_report"] = report  # its dataclass looks itself up there
specification.loader.exec_module(report)

MACHINE = {"device": "a processor", "cpu_count": 2}


@pytest.mark.parametrize(
    ("calibration", "ours", "rival", "merges"), [(100, 1, 11, 10), (101, 1, 11, 11), (5, 1, 100, 1), (5, 1, 1, None)]
)
def test_break_even(calibration, ours, rival, merges):
    assert report.break_even(calibration, ours, rival) == merges


def test_the_page_holds_every_result_and_says_when_a_fisher_has_paid(tmp_path):
    methods = {"sst kfac": {"cpu_s": 1.0}, "peft svd": {"cpu_s": 11.0}, "peft dare_linear": {"cpu_s": 0.5}}
    merges = {"machine": MACHINE, "results": [{"model": "SmolLM2-135M", "methods": methods}]}
    row = {"microseconds_per_token": 300.0}
    collection = {"machine": MACHINE, "runs": [{"model": "/models/small", "rows": {"sstmerge kfac at adapter": row}}]}
    (tmp_path / "merge-latency.json").write_text(json.dumps(merges))
    (tmp_path / "merge-latency.txt").write_text("a table\n")
    (tmp_path / "collection-base.json").write_text(json.dumps(collection))

    page = report.write_report(tmp_path).read_text()

    assert "a table" in page
    assert page.count("a processor") == 2
    # 100,000 tokens at 300 microseconds are 30 seconds, and ten seconds are saved by every merge.
    assert "| peft svd | 11.00 | kfac | 1.00 | 30 | 3 merges |" in page
    assert "| peft dare_linear | 0.50 | kfac | 1.00 | 30 | never: it is faster |" in page
    assert "/models" not in page


def test_slopes_are_those_of_the_steps_and_of_the_sum(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from merge_phase import slopes
    from merge_report import target_sentences

    def row(model, rank, adapters, parameters, cores, solve):
        steps = {"cores": {"cpu_s": cores, "wall_s": 1.0}, "solve": {"cpu_s": solve, "wall_s": 1.0}}
        ours = {"cpu_s": cores + solve, "wall_s": 2.0, "steps": steps}
        svd = {"cpu_s": parameters**2, "wall_s": 1.0, "extrapolated": "one block of 32, times the number of blocks"}
        names = {"model": model, "rank": rank, "adapters": adapters, "parameters": parameters}
        return {**names, "methods": {"sst kfac": ours, "peft svd": svd}}

    # The Gram pass grows with the parameters and the rank, the solve with the square of the number of adapters.
    models = [("Llama-3.2-1B", 1e6), ("Llama-2-7B", 4e6), ("Llama-2-70B", 16e6)]
    rows = [row(model, 16, 2, size, size, 1e9) for model, size in models]
    rows += [row("Llama-3.2-1B", rank, 2, 1e6 * rank / 16, 1e6 * rank / 16, 1e9) for rank in (4, 64)]
    rows += [row("Llama-3.2-1B", 16, count, 1e6, 1e6, 1e9 * (count / 2) ** 2) for count in (4, 20)]
    found = slopes(rows)
    assert found["parameters"]["sst kfac, cores"]["cpu_s"] == pytest.approx(1)
    assert found["parameters"]["sst kfac, solve"]["cpu_s"] == pytest.approx(0)
    assert 0 < found["parameters"]["sst kfac"]["cpu_s"] < 0.1
    assert found["rank"]["sst kfac, cores"]["cpu_s"] == pytest.approx(1)
    assert found["adapters"]["sst kfac, solve"]["cpu_s"] == pytest.approx(2)
    assert "peft svd" not in found["parameters"]
    (sentence,) = target_sentences(found["parameters"])
    assert "misses the target of 1.0 ± 0.05: it grows slower" in sentence
    (sentence,) = target_sentences({"sst kfac": {"cpu_s": 1.04}})
    assert "within the target" in sentence


def test_what_a_module_filter_saves_pays_for_its_pilot(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from collection import filter_savings

    times = {"sstmerge diagonal at base": [0.8], "sstmerge global at base": [1.6]}
    half = "sstmerge global at base, half of the modules"
    # Eight sequences take 1.6 s, in half of the modules 1.2 s; 32 of the pilot 3.2 s, which 64 sequences save.
    found = filter_savings({**times, half: [1.2]}, sequences=8)[half]
    assert found == {
        "pilot_cpu_s": pytest.approx(3.2),
        "saves": pytest.approx(0.25),
        "pays_from_sequences": pytest.approx(64),
    }
    assert filter_savings({**times, half: [1.7]}, sequences=8)[half]["pays_from_sequences"] is None


def test_every_phase_is_timed_and_summed(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from scaling import PHASES, Setting, draw, measure, slopes

    rows = [measure(Setting(rank=rank, experts=3, layers=1, hidden=64), ["kfac", "global"], 1) for rank in (2, 4)]
    assert [row["parameters"] for row in rows] == [2 * (4 * 128 + 3 * (64 + 168)), 4 * (4 * 128 + 3 * (64 + 168))]
    assert rows[0]["core_entries"] == 7 * 6**2
    for row in rows:
        for phases in row["structures"].values():
            assert set(phases) == set(PHASES)
            assert phases["merge"] == pytest.approx(sum(phases[p] for p in ("space", "solve", "select", "write_back")))
            assert phases["sum"] == pytest.approx(phases["calibration"] + phases["merge"])
    found = slopes("rank", rows)
    assert found["kfac"]["sum"]["all"] == pytest.approx(found["kfac"]["sum"]["last_two"])
    assert len(draw({"rank": {"points": rows, "slopes": found}}).axes) == 1


def test_a_run_stops_where_both_errors_are_within_the_tolerance(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from early_stopping import within

    look = {"kl": {"estimate": 0.02, "half_width": 0.004}, "step_error": 0.1}
    assert within(look, 0.2)
    assert not within(look, 0.19)
    assert not within({**look, "step_error": 0.21}, 0.2)
    assert not within({**look, "kl": {"estimate": 0.02, "half_width": None}}, 0.2)
