"""Parameters in mergekit's YAML files: a merged model, or a sentence and exit code 2."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from builders import collect_pair_files
from hostile import EXAMPLES, few
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mergekit", reason="the extra `mergekit` is not installed")

from sstmerge import mergekit_plugin

PARAMETERS = (
    "gain",
    "cost",
    "rule",
    "scale",
    "top",
    "fraction",
    "energy",
    "mu",
    "exponent",
    "budget",
    "damping",
    "weight",
    "nothing",
)
VALUES = (0, -1, 1, 3, 2**70, 1e-30, 1e30, "nan", "inf", True, None, "", "project", "joint", "../x", [1, 2], {"a": 1})


@pytest.fixture(scope="module")
def fishers(job, tmp_path_factory):
    return collect_pair_files(job, tmp_path_factory.mktemp("fishers"))


@settings(few, max_examples=max(2, EXAMPLES // 4))  # each reads a model
@given(
    changes=st.dictionaries(st.sampled_from(PARAMETERS), st.sampled_from(VALUES), min_size=1, max_size=2),
    role=st.sampled_from(["utility", "safety", "nobody", 3, None]),
)
def test_parameters(job, fishers, changes, role):
    models = [
        {"model": f"{job['base']}+{job['utility']}", "parameters": {"role": role}},
        {"model": f"{job['base']}+{job['safety']}", "parameters": {"role": "safety"}},
    ]
    config = {"merge_method": "sst", "base_model": job["base"], "models": models, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as place:
        file, out, err = Path(place) / "config.yaml", Path(place) / "merged", io.StringIO()
        file.write_text(yaml.safe_dump({**config, "parameters": {**fishers, **changes}}))
        arguments = [
            "sstmerge-mergekit",
            str(file),
            str(out),
            "--lora-merge-cache",
            f"{place}/cache",
            "--no-copy-tokenizer",
        ]
        code: Any = 0
        with mock.patch.object(sys, "argv", arguments), contextlib.redirect_stderr(err):
            try:
                mergekit_plugin.main()
            except SystemExit as exit_:
                code = exit_.code or 0
    assert code in (0, 2), (changes, role, code)
    assert code == 0 or "Error: " in err.getvalue()
