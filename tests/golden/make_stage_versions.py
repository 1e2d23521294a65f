"""Record which code each stage's VERSION stands for: ``python tests/golden/make_stage_versions.py``.

A stage's result may change when any module of ``stages/`` that it imports, directly or not, changes; then its VERSION
must rise, or cached artifacts of the old code would pass for the new.  The golden file holds, for every stage, its
VERSION and a hash of each of those modules (without comments, docstrings and blank lines).
When a change leaves every byte that a stage writes as it was (a rename, a message), record that instead:

    python tests/golden/make_stage_versions.py --no-output-change "why the outputs are the same"

Without that option the script refuses to record changed code under an unchanged VERSION.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import sys
import tokenize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "stage_versions.json"
STAGES = ("prepare_data", "train_classifier", "make_attention", "make_masks", "train_segmenter", "evaluate")


def module_file(module: str, root: Path = ROOT) -> Path | None:
    """The file of ``module`` below ``root``; None when there is none."""
    path = root.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imports_of(source: str, root: Path = ROOT) -> set[str]:
    """The modules of ``stages`` that ``source`` imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] == "stages" and module_file(name, root)}


def closure(stage: str, root: Path = ROOT) -> dict[str, str]:
    """Every module of ``stages`` that the stage's code reaches, with the hash of its code."""
    found: dict[str, str] = {}
    waiting = [f"stages.{stage}"]
    while waiting:
        module = waiting.pop()
        file = module_file(module, root)
        if module in found or file is None:
            continue
        source = file.read_text(encoding="utf-8")
        found[module] = hashlib.sha256(bare_code(source).encode()).hexdigest()[:16]
        parents = module.split(".")[:-1]
        waiting += [".".join(parents[:length]) for length in range(1, len(parents) + 1)]
        waiting += imports_of(source, root)
    return dict(sorted(found.items()))


def bare_code(source: str) -> str:
    """``source`` without comments, docstrings and blank lines: the same for every version of Python."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        for text in bare_strings(node):
            if not lines[text.lineno - 1][: text.col_offset].strip():  # alone on its lines
                lines[text.lineno - 1 : text.end_lineno] = [""] * ((text.end_lineno or text.lineno) - text.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def bare_strings(node: ast.AST) -> list[ast.Expr]:
    """Statements directly in ``node`` that are nothing but a string: its docstring and those of its fields."""
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return []
    return [
        statement
        for statement in body
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]


def version(stage: str, root: Path = ROOT) -> int:
    """The stage module's VERSION, read without importing it."""
    tree = ast.parse((root / "stages" / f"{stage}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["VERSION"]:
            return int(ast.literal_eval(node.value))
    raise LookupError(f"stages/{stage}.py has no VERSION = <number> at its top level")


def changes(golden: dict[str, Any], root: Path = ROOT) -> dict[str, list[str]]:
    """By stage: modules whose code is not the recorded one, added or gone."""
    found = {}
    for stage in STAGES:
        recorded, now = golden.get("stages", {}).get(stage, {}).get("modules", {}), closure(stage, root)
        changed = sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
        if changed:
            found[stage] = changed
    return found


def main(arguments: list[str]) -> int:
    """Write the golden file, or say which VERSION must rise first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-output-change", metavar="WHY", help="the changed code writes the same bytes as before")
    why = parser.parse_args(arguments).no_output_change
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    recorded = golden.get("stages", {})
    unbumped = {s: m for s, m in changes(golden).items() if s in recorded and recorded[s]["version"] == version(s)}
    if unbumped and not why:
        for stage, modules in unbumped.items():
            sys.stderr.write(f"{stage}: code changed under VERSION {version(stage)}: {', '.join(modules)}\n")
        sys.stderr.write("raise VERSION in stages/<stage>.py, or give --no-output-change WHY\n")
        return 1
    notes = golden.get("no_output_change", [])
    if unbumped and why:
        notes = [*notes, {"stages": sorted(unbumped), "why": why}]
    stages = {stage: {"version": version(stage), "modules": closure(stage)} for stage in STAGES}
    GOLDEN.write_text(json.dumps({"stages": stages, "no_output_change": notes}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
