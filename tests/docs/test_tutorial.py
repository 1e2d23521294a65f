"""The tutorial's commands, as they stand there, one after the other in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stages.contracts import read_index_mask

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_tutorial_from_its_first_command_to_its_last(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```sh\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(commands) == 10
    command = tmp_path / "bin" / "wsss"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipeline.cli.main "$@"\n')
    command.chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    paths = {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    script = "set -ex\n" + "".join(commands)
    done = subprocess.run(["bash", "-c", script], cwd=here, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^report: .*\.html$", done.stdout, flags=re.MULTILINE)
    names = {path.stem for path in (here / "photos" / "images").iterdir()}
    assert len(names) == 50
    for folder in ("masks", "masks_of_model"):
        assert {path.stem for path in (here / folder).glob("*.png")} == names
    one = sorted(names)[0]
    first, second = (read_index_mask(here / folder / f"{one}.png") for folder in ("masks", "masks_of_model"))
    assert (first == second).all()
    assert (here / "model" / "model.onnx").is_file()
