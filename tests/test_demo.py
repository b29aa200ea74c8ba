"""The demo on pico models, and its comparison at equal safety."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sstmerge.demo.trade_off import compare_at_equal_safety, curves, draw_trade_off
from sstmerge.pipeline.evaluate import Evaluation, Rate


def evaluation(name: str, harmful: int, benign: int, borderline: int = 0, utility: int = 10) -> Evaluation:
    rates = {
        "refusal_harmful": harmful,
        "refusal_benign": benign,
        "refusal_borderline": borderline,
        "utility_exact_match": utility,
        "degenerate": 0,
    }
    return Evaluation(
        name=name,
        kl_to_reference=None,
        counts={},
        completions={},
        **{key: Rate(count, 10) for key, count in rates.items()},
    )


@pytest.fixture
def sweep() -> list[Evaluation]:
    return [
        evaluation("base", 0, 0),
        evaluation("SST ×1", 6, 1, utility=9),
        evaluation("task arithmetic ×0.5", 4, 2, utility=8),
        evaluation("task arithmetic ×1", 8, 6, borderline=4, utility=4),
    ]


def test_curves_group_by_method_and_sort_by_scale(sweep):
    grouped = curves(list(reversed(sweep)))
    assert [scale for scale, _ in grouped["task arithmetic"]] == [0.5, 1.0]
    assert set(grouped) == {"SST", "task arithmetic"}


def test_the_comparison_interpolates_the_rival_at_equal_safety(sweep):
    (sentence,) = compare_at_equal_safety(sweep, "SST", "task arithmetic")
    # Half way between 40 % and 80 % refusal: over-refusal 40 %, borderline 20 %, utility 60 %.
    assert "refuses 60% of harmful" in sentence
    assert "10% against 40%" in sentence
    assert "0% against 20%" in sentence
    assert "90% against 60%" in sentence


def test_no_comparison_outside_the_range_of_the_rival(sweep):
    assert compare_at_equal_safety([*sweep[:1], evaluation("SST ×1", 9, 1), *sweep[2:]], "SST", "task arithmetic") == []


def test_the_picture_has_a_panel_per_measure(sweep):
    figure = draw_trade_off(sweep)
    assert [axis.get_ylabel().split(",")[0].split(" (")[0] for axis in figure.axes] == [
        "over-refusal of ordinary prompts",
        "over-refusal of borderline prompts",
        "utility",
    ]
    assert {line.get_label() for line in figure.axes[0].lines} >= {"SST", "task arithmetic"}


def test_the_demo_measures_writes_and_compares(tmp_path, monkeypatch, pico_llama, pico_tokenizer):
    """On a pico model with adapters of its own: every file is there and the numbers are those of the evaluations."""
    from peft import LoraConfig, get_peft_model

    from sstmerge.demo import run

    data = tmp_path / "data"
    (data / "adapters").mkdir(parents=True)
    base = tmp_path / "base"
    pico_llama().save_pretrained(base)
    pico_tokenizer().save_pretrained(base)
    for name in ("utility", "safety"):
        adapter = get_peft_model(
            pico_llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        )
        adapter.save_pretrained(data / "adapters" / name)
    for name in ("harmful", "benign", "borderline", "utility"):
        rows = [
            {"prompt": f"{name} {i}", "response": f"answer {i}", "split": split}
            for split in ("calibration", "test")
            for i in range(4)
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(run, "data_folder", lambda: data)
    out = tmp_path / "out"
    result = run.run_demo(out, base=str(base), limit=3)
    written = json.loads((out / "results.json").read_text())
    assert [e["name"] for e in written["evaluations"]] == [e.name for e in result.evaluations]
    assert written["evaluations"][0]["refusal_harmful"]["total"] == 3
    assert set(written["seconds"]) == {"model", "calibration", "merge", "evaluation"}
    assert (out / "trade_off.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "merged-adapter" / "adapter_model.safetensors").is_file()
    assert not list(Path(tmp_path).glob(".out*"))
