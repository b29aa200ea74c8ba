"""What there is to know about the methods, as tables for a terminal and as a page in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.markup import escape
from rich.table import Column, Table

from sstmerge.merging.methods import Method, Option

_NEEDS = {
    "safety": "the name of the safety adapter (`safety=`, `--safety NAME`)",
    "fishers": "a Fisher of every adapter's own data (`--fisher NAME=FILE`)",
    "gain": "a Fisher of harmful prompts (`--gain FILE`)",
    "gain_and_cost": "Fishers of harmful and of benign prompts (`--gain FILE --cost FILE`)",
    "aligned_pair": "an aligned model and the one it came from (`--aligned DIR --base DIR`)",
}
_ACTS_ON = {
    "core": "cores: ΔW_t = U C_t Vᵀ with orthonormal U and V, exactly; no dense matrix is formed",
    "delta": "dense ΔW, one layer at a time; the result is cut to a rank",
    "factors": "lora_A and lora_B",
}
_RANKS = {
    ("core", "lossless"): "what a lossless result takes",
    ("factors", "lossless"): "the sum of the adapters' ranks",
    ("factors", "largest"): "that of the adapters, which must be one",
    ("core", "largest"): "the largest rank among the adapters",
    ("delta", "largest"): "the largest rank among the adapters",
}
_HEADER = """\
# Merging methods

This page is written by `sstmerge methods --markdown`; do not edit it.

    sstmerge merge --method NAME --adapter a=DIR --adapter b=DIR --weight 1 --weight 0.5 --option key=value --out DIR
    sstmerge methods NAME

```python
sstmerge.merge_adapters({"a": "DIR", "b": "DIR"}, [1.0, 0.5], "ties", options={"density": 0.3}, out="merged")
```

ΔW_t = s_t B_t A_t is the weight change of adapter t, w_t its weight (1 unless given), T the number of adapters. All methods
here act on exact weight changes, whatever their split into factors, except where a method says that it acts on factors.
Layers that only some adapters have count as zero in the others. No method loads a model. The result has the dtype of the
adapters (the one that all promote to), one rank in all layers and a scaling of 1; `--rank` cuts it to a rank by the singular
value decomposition. `sst`, the method of this project, takes roles and Fishers instead: see the README.
"""


def overview_table(methods: Iterable[Method]) -> Table:
    """List methods.

    Args:
        methods: The methods.

    Returns:
        A table: name, title, needs, options.
    """
    table = Table(Column("method", no_wrap=True), "name in words", "acts on", "needs", "options")
    for method in methods:
        options = ", ".join(option.name for option in method.options)
        table.add_row(method.name, method.title, method.acts_on, ", ".join(method.needs), options)
    return table


def method_table(method: Method) -> Table:
    """Show all about a method.

    Args:
        method: The method.

    Returns:
        A table.
    """
    table = Table(title=f"{method.name}: {method.title}", show_header=False)
    for name, words in _facts(method):
        table.add_row(name, escape(words.replace("`", "")))
    for option in method.options:
        words = f"{option.help} Values: {_range(option)}; {_shown(option.default)} by default."
        table.add_row(f"option {option.name}", escape(words))
    return table


def markdown_page(methods: Iterable[Method]) -> str:
    """Return a page of all methods.

    Args:
        methods: The methods.

    Returns:
        The page.
    """
    methods = list(methods)
    lines = [_HEADER, "| method | | acts on | needs |", "|---|---|---|---|"]
    for method in methods:
        needs = ", ".join(need.replace("_", " ") for need in method.needs)
        lines.append(f"| [`{method.name}`](#{method.name}) | {method.title} | {method.acts_on} | {needs} |")
    for method in methods:
        lines += ["", f"## {method.name}", "", f"{method.title}.", "", f"    {method.formula}", ""]
        lines += [f"* {name}: {words}" for name, words in _facts(method)[1:]]
        if method.options:
            lines += ["", "| option | default | values | |", "|---|---|---|---|"]
        for option in method.options:
            lines.append(f"| `{option.name}` | {_shown(option.default)} | {_range(option)} | {option.help} |")
    return "\n".join(lines) + "\n"


def _facts(method: Method) -> list[tuple[str, str]]:
    facts = [("formula", method.formula), ("paper", method.paper), ("acts on", _ACTS_ON[method.acts_on])]
    if method.needs:
        facts.append(("needs", "; ".join(_NEEDS[need] for need in method.needs)))
    facts.append(("rank of the result", f"{_RANKS[method.acts_on, method.rank]}, unless given"))
    if method.acts_on == "factors":
        facts[-1] = ("rank of the result", _RANKS[method.acts_on, method.rank])
    if method.note:
        facts.append(("note", method.note.strip()))
    return facts


def _range(option: Option) -> str:
    if option.choices:
        return ", ".join(option.choices)
    if option.kind is bool:
        return "true, false"
    if option.kind is str:
        return "text"
    kind = "integer" if option.kind is int else "number"
    if option.low == -math.inf and option.high == math.inf:
        return kind
    left = "[" if option.low_is_allowed and option.low > -math.inf else "("
    right = "∞)" if option.high == math.inf else f"{_bound(option.high)}]"
    return f"{kind} in {left}{'-∞' if option.low == -math.inf else _bound(option.low)}, {right}"


def _bound(value: float) -> str:
    power = math.log2(value + 1) if value > 1e6 else 0.0
    return f"2^{round(power)} - 1" if power else f"{value:g}"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) if value != "" else "none"
