"""The import direction: cli → pipeline, demo → merging → {fisher, gevp, adapters} → ops → {_C, reference}; errors below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sstmerge

PACKAGE = Path(sstmerge.__file__).parent
ROOT = PACKAGE.parent
LONGEST_FILE = 450  # lines
# What each part may import of sstmerge; "sstmerge" is the version number in __init__, "*" all but a few.
BOTTOM = {"errors", "atomic", "untrusted", "batched_lu", "sstmerge"}
ALLOWED = {
    "errors": set(),
    "atomic": {"errors"},
    "untrusted": {"errors"},
    "batched_lu": set(),
    "reference": {"errors", "reference"},
    "ops": {"errors", "reference", "ops", "_C", "sstmerge"},
    "prompts": BOTTOM | {"fisher", "prompt_files"},
    "prompt_files": BOTTOM,
    "adapters": BOTTOM | {"ops", "adapters"},
    "fisher": BOTTOM | {"ops", "adapters", "fisher"},
    "gevp": BOTTOM | {"ops", "adapters", "fisher", "gevp"},
    "merging": BOTTOM | {"ops", "adapters", "fisher", "gevp", "merging"},
    "alignguard": BOTTOM | {"adapters"},
    "evaluation": BOTTOM | {"fisher", "prompts", "prompt_files", "evaluation"},
    "pipeline": {"*"},
    "peft_drop_in": {"*", "peft_drop_in"},
    "demo": {"*", "demo"},
    "cli": {"*", "demo", "cli"},
    "mergekit_plugin": {"*"},
    "fusion_bench_plugin": {"*"},
    "__init__": {"*", "peft_drop_in"},
    "__main__": {"cli"},
}
NOT_FOR_EVERYONE = {"cli", "demo", "peft_drop_in", "_C", "reference"}  # what "*" leaves out
EXCEPTIONS = {"pipeline/doctor.py": {"reference"}}  # it checks every op against its reference
THIRD_PARTY = {  # package: the parts that may import it
    "peft": {"adapters", "demo", "peft_drop_in"},
    "transformers": {"evaluation", "pipeline", "demo", "cli"},
    "lm_eval": {"evaluation"},
    "cupy": {"ops"},
    "typer": {"cli"},
    "mergekit": {"mergekit_plugin"},
    "fusion_bench": {"fusion_bench_plugin"},
}


def part_of(path):
    """Return the part of the package that a file belongs to: its folder, or its own name."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def is_typing_guard(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(path):
    """Yield (module, line, whether at the top of the file) for every import, dynamic ones included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {id(n) for guard in ast.walk(tree) if is_typing_guard(guard) for n in ast.walk(guard)}
    top = {id(n) for n in tree.body}
    package = ["sstmerge", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        at_top = id(node) in top
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, at_top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "sstmerge":  # from sstmerge import ops: a module, or a name of __init__
                for alias in node.names:
                    is_module = (PACKAGE / alias.name).is_dir() or (PACKAGE / f"{alias.name}.py").exists()
                    yield f"sstmerge.{alias.name}" if is_module or alias.name == "_C" else module, node.lineno, at_top
            else:
                yield module, node.lineno, at_top
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value), node.lineno, at_top


def first_party_part(module):
    names = module.split(".")
    return names[1] if len(names) > 1 else "sstmerge"


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_is_in_the_table():
    assert {part_of(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_direction(path):
    part = part_of(path)
    allowed = ALLOWED[part] | EXCEPTIONS.get(str(path.relative_to(PACKAGE)), set())
    for module, line, _ in imports_of(path):
        if module.split(".")[0] == "sstmerge":
            target = first_party_part(module)
            fine = target in allowed or ("*" in allowed and target not in NOT_FOR_EVERYONE)
            assert fine, f"{path.relative_to(ROOT)}:{line}: '{part}' must not import '{module}'"
        elif module.split(".")[0] in THIRD_PARTY:
            owners = THIRD_PARTY[module.split(".")[0]]
            assert part in owners, f"{path.relative_to(ROOT)}:{line}: only {sorted(owners)} import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_first_party_imports_are_at_the_top(path):
    """An import inside a function would be a way around the direction; only the extension is loaded late."""
    if part_of(path) == "cli":  # commands load torch only when they run
        return
    for module, line, at_top in imports_of(path):
        if module.split(".")[0] == "sstmerge" and module != "sstmerge._C":
            assert at_top, f"{path.relative_to(ROOT)}:{line}: move {module} to the top"


def test_the_walk_sees_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "merging").mkdir()
    (tmp_path / "ops.py").write_text("")
    path = tmp_path / "merging" / "x.py"
    path.write_text(
        "import sstmerge.cli\nfrom sstmerge import ops, __version__\nfrom .. import ops\nfrom ..fisher import batch\n"
        "from .y import z\ndef f():\n    import peft\n    __import__('sstmerge.demo')\n"
        "if TYPE_CHECKING:\n    import transformers\n"
    )
    assert sorted((m, top) for m, _, top in imports_of(path)) == sorted(
        [
            ("sstmerge.cli", True),
            ("sstmerge.ops", True),
            ("sstmerge", True),
            ("sstmerge.ops", True),
            ("sstmerge.fisher", True),
            ("sstmerge.merging.y", True),
            ("peft", False),
            ("sstmerge.demo", False),
        ]
    )


def source_files():
    csrc = ROOT / "csrc"
    suffixes = {".cpp", ".h", ".cu", ".cuh"}
    folders = (csrc, ROOT / "tests" / "emulation")
    return FILES + sorted(p for folder in folders for p in folder.rglob("*") if p.suffix in suffixes)


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_too_long(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{path.relative_to(ROOT)} has {lines} lines; split it by what it does"
