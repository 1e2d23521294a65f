"""The notebook runs from its first cell to its last, and shows pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own are no concern of ours
def test_the_notebook_runs_and_shows_pictures(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    shutil.copytree(DOCS / "photos", tmp_path / "photos")
    notebook = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    here = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=480, kernel_name="python3", resources=here)
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/jpeg" in output.get("data", {})]
    assert len(pictures) == 7
    printed = "\n".join(output.get("text", "") for output in outputs)
    assert "expected values in [0, 1] that sum to 1" in printed
    assert "'make_attention': 'cached'" in printed
