"""Standard tasks through the lm-evaluation-harness, on a task of our own so that nothing is downloaded."""

from __future__ import annotations

import json
import sys

import pytest

from sstmerge.errors import InputError
from sstmerge.evaluation.standard_tasks import run_standard_tasks


def test_without_the_extra(monkeypatch, pico_llama, pico_tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'sstmerge\[evaluation\]'"):
        run_standard_tasks(pico_llama(), pico_tokenizer(), ["mmlu"])


def test_a_local_task(tmp_path, pico_llama, pico_tokenizer):
    pytest.importorskip("lm_eval", reason="the extra 'evaluation' is not installed")
    rows = [{"question": f"Is {n} even", "label": n % 2} for n in range(6)]
    data = tmp_path / "even.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "sstmerge_even",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}?",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "even.yaml").write_text(json.dumps(task))
    (score,) = run_standard_tasks(pico_llama(), pico_tokenizer(), ["sstmerge_even"], task_folder=tmp_path)
    assert score.task == "sstmerge_even"
    assert score.metric == "acc,none"
    assert score.value in [n / 6 for n in range(7)]
