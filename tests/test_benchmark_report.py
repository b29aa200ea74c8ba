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
