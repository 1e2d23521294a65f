"""A stage whose code changed has a new VERSION, or a recorded reason why its output is the same."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine.stage_table import STAGES, TABLE

GOLDEN_FOLDER = Path(__file__).parent / "golden"
spec = importlib.util.spec_from_file_location("make_stage_versions", GOLDEN_FOLDER / "make_stage_versions.py")
assert spec is not None
assert spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_every_changed_stage_has_a_new_version_or_a_reason() -> None:
    golden = json.loads(tool.GOLDEN.read_text(encoding="utf-8"))
    problems = []
    for stage, modules in tool.changes(golden).items():
        is_bumped = golden["stages"][stage]["version"] != tool.version(stage)
        problems.append(
            f"{stage}: {', '.join(modules)} changed; "
            + ("" if is_bumped else f"raise VERSION ({tool.version(stage)}) in stages/{stage}.py, then ")
            + "run python tests/golden/make_stage_versions.py"
            + ("" if is_bumped else "; or, if no byte of its output changes, with --no-output-change WHY")
        )
    assert not problems, "\n".join(problems)


def test_versions_are_those_of_the_table() -> None:
    assert tool.STAGES == STAGES
    assert {stage: tool.version(stage) for stage in STAGES} == {spec.name: spec.version for spec in TABLE.specs}


def test_closure_covers_every_module_that_a_stage_loads() -> None:
    code = (
        "import sys, importlib; importlib.import_module('stages.make_masks'); "
        "print(*(name for name in sys.modules if name.split('.')[0] == 'stages'))"
    )
    root = GOLDEN_FOLDER.parents[1]
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert set(answer.stdout.split()) <= set(tool.closure("make_masks"))
    assert "stages.ops.crf.torch_backend" in tool.closure("make_masks")  # imported inside a function only
    assert "stages.train_classifier" not in tool.closure("make_masks")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six stages of one line; make_masks imports an operation inside a function."""
    (tmp_path / "stages" / "ops").mkdir(parents=True)
    for name in ("__init__", "ops/__init__"):
        (tmp_path / "stages" / f"{name}.py").write_text("")
    for stage in STAGES:
        (tmp_path / "stages" / f"{stage}.py").write_text("VERSION = 1\n")
    (tmp_path / "stages" / "ops" / "crf.py").write_text('"""Doc."""\n\nSTEPS = 10  # why\n')
    (tmp_path / "stages" / "make_masks.py").write_text("VERSION = 1\ndef f():\n    from stages.ops import crf\n")
    for function in ("module_file", "imports_of", "closure", "version", "changes"):
        original = getattr(tool, function)
        defaults = (*(original.__defaults__ or ())[:-1], tmp_path)
        monkeypatch.setattr(original, "__defaults__", defaults)
    monkeypatch.setattr(tool, "GOLDEN", tmp_path / "golden.json")
    assert tool.main([]) == 0
    return tmp_path


def found(house: Path) -> dict[str, list[str]]:
    return tool.changes(json.loads((house / "golden.json").read_text()))


def test_comments_docstrings_and_blank_lines_do_not_count(house: Path) -> None:
    crf = house / "stages" / "ops" / "crf.py"
    crf.write_text('"""Another\n\ntext."""\nSTEPS = 10\n\n"""What a step is."""\n# because\n')
    assert found(house) == {}
    crf.write_text('STEPS = "10  # no comment"\n')
    assert found(house) == {"make_masks": ["stages.ops.crf"]}


def test_changed_code_is_not_recorded_without_a_bump_or_a_reason(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (house / "stages" / "ops" / "crf.py").write_text("STEPS = 11\n")
    assert found(house) == {"make_masks": ["stages.ops.crf"]}
    assert tool.main([]) == 1
    assert "make_masks: code changed under VERSION 1: stages.ops.crf" in capsys.readouterr().err
    assert tool.main(["--no-output-change", "renamed"]) == 0
    golden = json.loads((house / "golden.json").read_text())
    assert golden["no_output_change"] == [{"stages": ["make_masks"], "why": "renamed"}]
    assert found(house) == {}
    (house / "stages" / "ops" / "crf.py").write_text("STEPS = 12\n")
    masks = house / "stages" / "make_masks.py"
    masks.write_text(masks.read_text().replace("VERSION = 1", "VERSION = 2"))
    assert tool.main([]) == 0
    assert json.loads((house / "golden.json").read_text())["stages"]["make_masks"]["version"] == 2
