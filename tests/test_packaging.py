"""The wheel holds the three packages, the shipped configs and the report's template, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_what_a_user_needs(tmp_path: Path):
    copy = tmp_path / "source"  # setuptools leaves build folders beside pyproject.toml
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("wsss_pipeline-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    modules = {str(p.relative_to(copy)) for top in ("wsss", "pipeline", "stages") for p in (copy / top).rglob("*.py")}
    configs = {f"pipeline/_configs/{p.name}" for p in (copy / "configs").glob("*.yaml")}
    deploy = {f"pipeline/_deploy/{name}.yaml" for name in ("prefect", "automations")}
    assert (
        modules | configs | deploy | {"pipeline/report/report.html", "pipeline/report/metrics.csv", "wsss/py.typed"}
        <= names
    )
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"wsss", "pipeline", "stages"}
    assert (
        "pipeline.cli.main:main"
        in zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    )
