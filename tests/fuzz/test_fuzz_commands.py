"""Configurations and flags of any content: success, or words and exit code 2."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hostile import check_command, few, json_values, spoiled_bytes, texts
from hypothesis import given
from hypothesis import strategies as st
from valid_files import STRUCTURES

NUMBERS = ("0", "-1", "1", "2", "0.5", "1e-30", "1e30", "1e400", "nan", "inf", "-inf", "9" * 30, "0.001,0.01", ",")
NAMES = (
    "",
    "x",
    "../x",
    "~nobody/x",
    "kfac",
    "project",
    "wiener",
    "joint",
    "refit",
    "a=b",
    "=",
    "[red]",
    "ties",
    "sst",
)
words = st.sampled_from((*NUMBERS, *NAMES))
MERGE_FLAGS = (
    *(
        "--rule",
        "--scale",
        "--top",
        "--fraction",
        "--energy",
        "--mu",
        "--exponent",
        "--budget",
        "--rank",
        "--damping",
        "--utility-weight",
    ),
    *(
        "--structure",
        "--seed",
        "--method",
        "--weight",
        "--option",
        "--fisher",
        "--split",
        "--limit",
        "--dtype",
        "--config",
    ),
)
CURVE_FLAGS = (
    "--budgets",
    "--scales",
    "--rule",
    "--top",
    "--fraction",
    "--energy",
    "--mu",
    "--exponent",
    "--rank",
    "--damping",
)
METHOD_FLAGS = ("--weight", "--option", "--seed", "--rank", "--dtype", "--safety", "--adapter", "--fisher", "--gain")


def flags(names):
    return st.lists(
        st.tuples(st.sampled_from(names), words | texts.filter(lambda t: "\x00" not in t and t.isprintable())),
        max_size=3,
    )


def flat(pairs):
    return [part for pair in pairs for part in pair]


def from_fishers(valid, structure):
    gain, cost = valid.fishers[structure]
    adapters = ["--utility", str(valid.adapters["utility"]), "--safety", str(valid.adapters["safety"])]
    return ["--gain", str(gain), "--cost", str(cost), *adapters]


@few
@given(structure=st.sampled_from(STRUCTURES), given_flags=flags(MERGE_FLAGS))
def test_flags_of_merge(valid, structure, given_flags):
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "merged"
        code = check_command(["merge", *from_fishers(valid, structure), "--out", str(out), *flat(given_flags)], out)
        if code == 0:
            assert check_command(["verify", str(out)]) == 0


@few
@given(structure=st.sampled_from(["diagonal", "global"]), given_flags=flags(CURVE_FLAGS))
def test_flags_of_curve(valid, structure, given_flags):
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "curve"
        check_command(["curve", *from_fishers(valid, structure), "--out", str(out), *flat(given_flags)], out)


@few
@given(
    method=st.sampled_from(["linear", "ties", "dare_linear", "tsv", "knots_ties", "fisher_merge", "no such"]),
    given_flags=flags(METHOD_FLAGS),
)
def test_flags_of_other_methods(valid, method, given_flags):
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "merged"
        adapters = [part for path in valid.adapters.values() for part in ("--adapter", str(path))]
        check_command(["merge", "--method", method, *adapters, "--out", str(out), *flat(given_flags)], out)


@few
@given(
    content=st.dictionaries(
        st.sampled_from([flag.lstrip("-") for flag in MERGE_FLAGS]) | texts, json_values, max_size=3
    ).map(lambda value: json.dumps(value).encode())
    | spoiled_bytes(b"top: 3\nrule: project\nstability: false\nscale: ~\nutility-weight: [1.0]\n")
    | st.sampled_from([b"a: &x [1]\nb: *x\n", b"? [1]\n: 2\n", b"!!python/object/apply:os.system [id]\n", b"[" * 5000]),
)
def test_configurations(valid, content):
    with tempfile.TemporaryDirectory() as place:
        out, config = Path(place) / "merged", Path(place) / "merge.yaml"
        config.write_bytes(content)
        arguments = ["merge", "--config", str(config), *from_fishers(valid, "diagonal"), "--out", str(out)]
        check_command(arguments, out)


@few
@given(path=words | texts.filter(lambda t: "\x00" not in t), command=st.sampled_from(["inspect", "verify", "methods"]))
def test_names_of_nothing(path, command):
    check_command([command, "--", path])
